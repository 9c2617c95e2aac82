"""Tables and plots."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tabulate import tabulate

from sidt.allocation.curve import Point, knees
from sidt.allocation.paying import LayerTime
from sidt.cost.complexity import ComplexityReport, report
from sidt.files import replacing
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace

matplotlib.use("Agg")

# How good a model is, in evaluation.json, by the key that a row has.
QUALITIES = {"top1": "top-1", "agreement": "same answer as dense", "neighbours": "same neighbour as dense"}

Format = Literal["table", "md", "csv", "latex", "json"]
_TABULATE = {"table": "simple", "md": "github", "latex": "latex_booktabs"}


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], style: Format = "table") -> str:
    """Rows as text; numbers are aligned right and given as they come."""
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([headers, *rows])
        return buffer.getvalue().rstrip("\n")
    numeric = ["right" if rows and not isinstance(rows[0][i], str) else "left" for i in range(len(headers))]
    shown = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    align = ["right" if n == "right" else "left" for n in numeric]
    return tabulate(shown, headers, tablefmt=_TABULATE[style], colalign=align if rows else None, disable_numparse=True)


def complexity_text(dense: ComplexityReport, sliced: ComplexityReport | None, style: Format) -> str:
    """The complexity of a model, or of a dense and a sliced one side by side.

    In JSON ``params`` and ``macs`` are the totals of the model itself: of the sliced one where there is one.
    """
    if style == "json":
        shown = _as_json(sliced or dense) | ({"dense": _as_json(dense)} if sliced else {})
        return json.dumps(shown, indent=1)
    raw = style == "csv"
    rows: list[list[Any]] = []
    for name, reports in _aligned(dense, sliced).items():
        cells: list[Any] = [name]
        for value in ("params", "macs"):
            numbers = [getattr(r, value) if r else 0 for r in reports]
            cells += numbers
            if sliced is not None and not raw:
                cells.append(f"{numbers[1] / numbers[0]:.1%}" if numbers[0] else "-")
        rows.append(cells)
    if sliced is None:
        headers = [dense.model, "params", "MACs"]
    elif raw:
        headers = [dense.model, "dense params", "sliced params", "dense MACs", "sliced MACs"]
    else:
        headers = [dense.model, "dense params", "sliced", "kept", "dense MACs", "sliced", "kept"]
    text = table(headers, rows, style)
    size = "x".join(map(str, dense.input_size))
    counted = f"MACs for one {size} image, a multiply-add counted as 1, attention included."
    return text if raw else f"{text}\n\n{counted} Not counted: {dense.not_counted}."


def latency_text(rows: Sequence[LayerTime], where: Mapping[str, Any], style: Format = "table") -> str:
    """What a plan does to the time of each layer beside its multiply-adds, and which layers do not pay."""
    if style == "json":
        return json.dumps({"where": dict(where), "layers": [vars(row) for row in rows]}, indent=1)
    cells = []
    for row in rows:
        times = [f"{row.dense_ms:.3f}", f"{row.sliced_ms:.3f}", f"{row.latency:.1%}", f"{row.macs:.1%}"]
        cells.append([row.name, *times, "yes" if row.pays else "no"])
    text = table(["layer", "dense ms", "sliced ms", "time left", "MACs left", "pays"], cells, style)
    if style == "csv":
        return text
    lazy = [row.name for row in rows if not row.pays and not row.name.startswith("(")]
    says = f"{len(lazy)} layers do not pay: {', '.join(lazy)}" if lazy else "Every layer pays"
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
    return f"{text}\n\n{says}. A layer pays if its time shrinks as its MACs do, to 10 %. Measured on {facts}."


def _as_json(report: ComplexityReport) -> dict[str, Any]:
    return {
        "model": report.model,
        "input_size": list(report.input_size),
        "params": report.params,
        "macs": report.macs,
        "not_counted": report.not_counted,
        "rows": [{"name": r.name, "params": r.params, "macs": r.macs} for r in report.rows],
    }


def _aligned(dense: ComplexityReport, sliced: ComplexityReport | None) -> dict[str, list[Any]]:
    """Rows of both reports by name, the total last."""
    names = [row.name for row in dense.rows]
    reports = [dense] if sliced is None else [dense, sliced]
    by_name = [{row.name: row for row in r.rows} for r in reports]
    aligned: dict[str, list[Any]] = {name: [rows.get(name) for rows in by_name] for name in names}
    return aligned | {"total": list(reports)}


def results_table(rows: dict[str, Any], style: Format = "table") -> str:
    """Accuracy and costs of the models of a run."""
    what, _ = quality(next(iter(rows.values())))
    headers = ["model", what, "params", "MACs", "latency (ms)"]
    cells = [
        [
            name,
            f"{percent(quality(r)[1])} +- {100 * r['error']:.2f}",
            r["params"],
            r["macs"],
            f"{r['latency_ms']:.2f}",
        ]
        for name, r in rows.items()
    ]
    if any("relative_error" in r for r in rows.values()):
        headers.insert(2, "relative error")
        for row, r in zip(cells, rows.values(), strict=True):
            row.insert(2, f"{r['relative_error']:.4f}")
    return table(headers, cells, style)


def quality(row: Mapping[str, Any]) -> tuple[str, float]:
    """What a row of evaluation.json says of a model: what it is, and a fraction."""
    key = next(key for key in QUALITIES if key in row)
    return QUALITIES[key], float(row[key])


def curve_text(front: Sequence[Point], space: DimensionSpace, judged_by: str) -> str:
    """Where the curve of a Pareto search bends, as Markdown."""
    dense = report(space)
    cells = [
        [f"{p.share:.3g}", f"{p.value:.4f}", p.params, percent(p.params / dense.params), p.macs]
        for p in sorted(knees(front), key=lambda p: -p.share)
    ]
    shown = table(["--at", judged_by, "params", "kept", "MACs"], cells, "md")
    return f"Where the curve bends; `sidt slice RUN --at SHARE` takes any point of it:\n\n{shown}\n\n"


def percent(part: float) -> str:
    """A part in percent, with two decimals."""
    return f"{part:.2%}"


def dimensions_table(space: DimensionSpace, shares: Mapping[str, float]) -> str:
    """The dimensions of a space: kind, size, the share of the parameters of each; whether widths can be rotated."""
    rows = [
        [
            d.name,
            d.kind,
            f"{space.sizes[d.per]} x {d.size}" if d.per else str(d.size),
            f"{shares[d.name]:.1%}",
            "whole" if d.fixed else "yes",
        ]
        for d in space.dimensions.values()
    ]
    text = table(["dimension", "kind", "size", "of the params", "searchable"], rows)
    rotations = [
        f"{width}: not rotated, since {stream}" if isinstance(stream, str) else f"{width}: can be rotated (sidt.align)"
        for width, stream in space.streams.items()
    ]
    return "\n".join([text, "", *rotations]).rstrip()


def plot_kept(plan: DimensionPlan, path: Path) -> None:
    """Draw the kept share of every dimension: one row a kind, one column a block."""
    space, sizes = plan.space, plan.sizes
    kinds = [k for k in ("heads", "qk", "v", "mlp", "width") if any(d.kind == k for d in space.dimensions.values())]
    blocks = space.blocks()
    figure = Figure(figsize=(1.6 + 0.62 * max(len(blocks), 6), 1.2 + 0.55 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for dimension in space.dimensions.values():
        columns = [i for i, b in enumerate(blocks) if b[: len(dimension.index)] == dimension.index]
        for column in columns:
            row = kinds.index(dimension.kind)
            size = sizes[dimension.name] if dimension.per is None or sizes[dimension.per] else 0
            grid[row, column] = size / max(dimension.size, 1)
            axes.text(
                column,
                row,
                str(size),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if grid[row, column] > 0.45 else "white",
            )
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(blocks)), [".".join(map(str, b)) for b in blocks])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.set_title("units kept (q/k and v: per head)")
    figure.colorbar(image, ax=axes, label="share kept")
    _save(figure, path)


def plot_search(values: Sequence[float], plain: float, dense: float | None, score: str, path: Path) -> None:
    """Draw the score of every trial, the best so far, the plain ranking and the dense model."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(values)), values, "o", markersize=4, alpha=0.6, label="trial")
    axes.step(range(len(values)), np.maximum.accumulate(values), where="post", label="best so far")
    axes.axhline(plain, linestyle="--", color="gray", label="plain ranking")
    if dense is not None:
        axes.axhline(dense, linestyle=":", color="black", label="dense")
    axes.set_xlabel("trial")
    axes.set_ylabel(score)
    axes.legend()
    _save(figure, path)


def plot_front(
    front: Sequence[Point],
    trials: Sequence[tuple[float, float, bool]],
    dense: float,
    kind: str,
    score: str,
    path: Path,
) -> None:
    """Draw the curve of a Pareto search: score against the part of the dense model's cost.

    Args:
        front: the curve.
        trials: of each its share, its score, and whether it is the plain ranking.
        dense: the dense model's score.
        kind: what the share is of.
        score: what the score is.
        path: the picture.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*((100 * share, value) for share, value, _ in trials), strict=True), ".", color="C7", label="trial")
    plain = sorted((100 * share, value) for share, value, is_plain in trials if is_plain)
    if plain:
        axes.plot(*zip(*plain, strict=True), "s--", color="C1", markersize=4, label="plain ranking")
    axes.plot(
        [100 * p.share for p in front], [p.value for p in front], "o-", color="C0", markersize=4, label="best found"
    )
    axes.axhline(dense, linestyle=":", color="black", label="dense")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{kind} left, in %")
    axes.set_ylabel(score)
    low = min([dense, *(p.value for p in front), *(value for _, value in plain)])
    high = max([dense, *(value for _, value, _ in trials)])
    axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
