"""Tables of what a run, a model or a plan costs, as text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sidt.allocation.curve import Point, knees
from sidt.allocation.paying import LayerTime
from sidt.cost.complexity import ComplexityReport, report
from sidt.report.tables import Format, table
from sidt.space.space import DimensionSpace

# How good a model is, in evaluation.json, by the key that a row has.
QUALITIES = {"top1": "top-1", "agreement": "same answer as dense", "neighbours": "same neighbour as dense"}


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
