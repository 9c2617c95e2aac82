"""The complexity table of a detector: backbone, neck and heads, dense and pruned, side by side."""

import json
from pathlib import Path
from typing import Any

from sidt.allocation.greedy import uniform
from sidt.cost.budget import Budget
from sidt.cost.complexity import Row
from sidt.detection.detectors.checkpoints import CONFIG
from sidt.detection.detectors.configs import build_detector, input_size_of, read_config
from sidt.detection.detectors.space import detector_space, not_counted, parts
from sidt.report.tables import Format, table
from sidt.space.plan import has_channels, load_plan
from sidt.space.trace import InputSize

_LEFT = (0.8, 0.6)  # of the backbone's parameters


def complexity_text(source: str, plan: Path | None, input_size: InputSize | None, style: Format) -> str:
    """Parameters and multiply-adds of a detector's parts, for one image.

    Args:
        source: an MMDetection config, a detection run (whose plan is taken), or a detector's folder.
        plan: dense beside this plan; default: beside 20 % and 40 % fewer parameters in the backbone, with q/k, v and
            MLP sizes shrunk alike.
        input_size: channels, height, width; default: the test pipeline's, 3 x 800 x 1280 for COCO's.
        style: of the text.

    Raises:
        InputError: the source is none of these, its backbone has no space, or the plan is for another one.
    """
    path = Path(source)
    if path.is_dir():
        own = path / "search" / "plan.json"
        plan = plan or (own if own.is_file() else None)
        path = path / "dense" / CONFIG if (path / "dense" / CONFIG).is_file() else path / CONFIG
    config = read_config(path)
    detector = build_detector(config)
    size = input_size or input_size_of(config)
    space = detector_space(detector, config.model, size, outside=plan is not None and has_channels(plan))
    if plan is not None:
        columns: dict[str, Any] = {"dense": None, "sliced": load_plan(plan, space).sizes}
        note = ""
    else:
        columns = {"dense": None} | {f"{1 - p:.0%} fewer": uniform(space, Budget(params=p)).sizes for p in _LEFT}
        note = " Fewer: of the backbone's parameters, by q/k, v and MLP sizes that shrink alike."
    found = {name: _with_total(parts(space, sizes)) for name, sizes in columns.items()}
    left_out = not_counted(detector, space)
    if style == "json":
        shown = {
            n: {part: {"params": r.params, "macs": r.macs} for part, r in rows.items()} for n, rows in found.items()
        }
        total = list(found.values())[-1 if plan is not None else 0]["total"]
        top = {"params": total.params, "macs": total.macs, "input_size": list(size), "not_counted": left_out}
        return json.dumps(top | {"models": shown}, indent=1)
    headers = [type(detector).__name__, *(f"{name} {what}" for what in ("params", "MACs") for name in found)]
    lines = [
        [part, *(rows[part].params for rows in found.values()), *(rows[part].macs for rows in found.values())]
        for part in found["dense"]
    ]
    text = table(headers, lines, style)
    if style == "csv":
        return text
    shape = "x".join(map(str, size))
    return (
        f"{text}\n\nMACs for one {shape} image, a multiply-add counted as 1, attention included.{note} "
        f"Not counted: {left_out}."
    )


def _with_total(rows: dict[str, Row]) -> dict[str, Row]:
    total = Row("total", sum(r.params for r in rows.values()), sum(r.macs for r in rows.values()))
    return rows | {"total": total}
