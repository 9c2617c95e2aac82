"use strict";

// Colours of a plot are those of the page, in light and in dark; a colour "var(--name)" is looked up.
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function figureOf(plot) {
  const lookUp = (_, value) => {
    const named = typeof value === "string" && value.match(/^var\((--[a-z]+)\)$/);
    return named ? colour(named[1]) : value;
  };
  return JSON.parse(document.getElementById(plot.dataset.figure).textContent, lookUp);
}

function drawPlots() {
  const axis = {
    gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true,
    title: { standoff: 12 },
  };
  const template = {
    layout: {
      colorway: ["--accent", "--warn", "--other", "--quiet"].map(colour),
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--quiet") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: axis, yaxis: axis,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { align: "left" },
      margin: { l: 8, r: 24, t: 32, b: 8 },
      dragmode: false,  // a finger on a plot scrolls the page
    },
  };
  for (const plot of document.querySelectorAll(".plot")) {
    const { data, layout } = figureOf(plot);
    Plotly.react(plot, data, { ...layout, template }, { responsive: true, displayModeBar: false });
  }
}

function sortBy(button) {
  const header = button.closest("th");
  const body = header.closest("table").tBodies[0];
  const column = header.cellIndex;
  const numeric = header.classList.contains("number");
  const seen = header.getAttribute("aria-sort");
  const order = seen ? (seen === "ascending" ? "descending" : "ascending") : (numeric ? "descending" : "ascending");
  const key = (row) => (numeric ? Number(row.cells[column].dataset.sort) : row.cells[column].textContent);
  const compare = (a, b) => (numeric ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, { numeric: true }));
  const rows = [...body.rows].sort((a, b) => (order === "ascending" ? compare(a, b) : compare(b, a)));
  body.append(...rows);
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
}

for (const button of document.querySelectorAll(".sortable button")) {
  button.addEventListener("click", () => sortBy(button));
}
if (document.querySelector(".plot")) {
  drawPlots();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlots);
}
