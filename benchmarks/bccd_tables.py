"""The rows of benchmarks/bccd.py: what is measured, what it is called, and the tables of it."""

from pathlib import Path
from typing import Any

import numpy as np

from detection import spread
from sidt.files import read_json, write_json
from sidt.report.tables import table

SHARES, KINDS = (0.4, 0.2, 0.1, 0.05), {"params": "parameters", "macs": "MACs"}
WHOLE, WHOLE_SHARES = "whole", (0.5, 0.3, 0.2, 0.15, 0.12)  # the budget is the detector's
FAST = (0.5, 0.4)  # of its latency
SEARCHED = "search"
SCORES = "dense.json"  # of the dense detector, in the folder of a seed
OURS, TAYLOR = "SiDT", "Taylor of each parameter"
DENSE = "dense, trained on as long"
# What is fine-tuned: a way, what is counted, and the share that is left.
TUNED = [
    *((OURS, "params", share) for share in SHARES),
    *((OURS, "macs", share) for share in (0.1, 0.05)),
    *((way, "params", 0.1) for way in (TAYLOR, "L2", "random")),
    (OURS, WHOLE, 0.15),
]
_TRAINED = [(DENSE, "params", 1.0), *TUNED]


def name_of(way: str, kind: str, share: float) -> str:
    """What a row is called."""
    counted = "detector's MACs" if kind == WHOLE else KINDS.get(kind)
    return way if way == DENSE else f"{way}, {share:.0%} of the {counted}"


def plain(name: str) -> str:
    """A name as that of a folder or file."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def place_of(way: str, kind: str, share: float) -> str:
    """The folder of a detector under a budget of the whole."""
    return plain(f"{way} {share}" if kind == "macs" else f"{way} {kind} {share}")


def measured(folders: list[Path], row: str) -> tuple[list[Any], str]:
    """What there is of a row, and how many seeds it is of, where these are not all."""
    found = [read_json(file) for folder in folders if (file := folder / row / "row.json").is_file()]
    return found, "" if len(found) == len(folders) else f" ({len(found)} of {len(folders)} seeds)"


def finished(folders: list[Path]) -> dict[str, tuple[list[Any], str]]:
    """The rows that are fine-tuned with some seed, by name."""
    rows = {name: measured(folders, f"rows/{plain(name)}") for name in (name_of(*row) for row in _TRAINED)}
    return {name: row for name, row in rows.items() if row[0]}


def put_back(known: dict[str, Any], folder: Path) -> None:
    """Rows of an earlier results file as files of a seed's folder that has none: not weights, but what they gave."""
    files = {f"curves/{name}.json": row for name, row in known.get("curves", {}).items()}
    files |= {
        f"{kept}/{name}/row.json": row
        for kept in ("rows", WHOLE, SEARCHED)
        for name, row in known.get(kept, {}).items()
    }
    if "dense" in known:
        files[SCORES] = known["dense"]
    for name, row in files.items():
        if not (folder / name).is_file():
            write_json(folder / name, row)


def dense_line(folders: list[Path]) -> str:
    """The scores of the dense detectors."""
    found = [read_json(folder / SCORES) for folder in folders]
    whole = [f"{key} {spread([own[key] for own in found])}" for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
    each = [f"{name} {spread([own['classes'][name] for own in found])}" for name in found[0]["classes"]]
    return f"The dense detector: {', '.join([*whole, *each])}."


def untrained_table(folders: list[Path], kind: str) -> str:
    """AP without training by what is left, mean and spread over the seeds."""
    lines = []
    for file in sorted({f.name for f in (folders[0] / "curves").glob(f"*-{kind}.json")}, key=_order):
        found = [read_json(folder / "curves" / file) for folder in folders]
        cells = [
            spread([own[i] for own in found]) if all(own[i] is not None for own in found) else "-" for i in range(4)
        ]
        lines.append([_title(file), *cells])
    return table(["", *(f"{share:.0%} of the {KINDS[kind]}" for share in SHARES)], lines, "md")


def _order(file: str) -> int:
    return [*map(plain, (OURS, TAYLOR, "CORP", "VBP", "L2", "random"))].index(file.rsplit("-", 1)[0])


def _title(file: str) -> str:
    return (OURS, f"{TAYLOR} (Torch-Pruning's score)", "CORP", "VBP", "L2", "random")[_order(file)]


def whole_table(folders: list[Path], times: dict[str, float]) -> str:
    """AP without training, where its MACs are, and latency, by what is left of the detector."""
    lines = []
    for way, title in ((f"{OURS} {WHOLE}", "backbone, neck and head"), (f"backbone {WHOLE}", "backbone alone")):
        for share in WHOLE_SHARES:
            place = place_of(way, "macs", share)
            found = [read_json(folder / WHOLE / place / "row.json") for folder in folders]
            if any(own is None for own in found):
                lines.append([title, f"{share:.0%}", *"-----"])
                continue
            first, total = found[0]["macs"], sum(found[0]["macs"].values())
            split = [f"{first[part] / total:.0%}" for part in ("backbone", "neck", "bbox_head")]
            lines.append([title, f"{share:.0%}", spread([own["AP"] for own in found]), *split, f"{times[place]:.1f}"])
    headers = ["cut", "detector's MACs", "AP", "of these: backbone", "neck", "head", "ms, detector"]
    return table(headers, lines, "md")


def fast_table(folders: list[Path]) -> str:
    """AP without training by the latency that is asked for, and what it is then."""
    lines = []
    for way, title in ((f"{OURS} {WHOLE}", "backbone, neck and head"), (f"backbone {WHOLE}", "backbone alone")):
        for share in FAST:
            found = [read_json(folder / WHOLE / place_of(way, "latency", share) / "row.json") for folder in folders]
            there = [own for own in found if own is not None]
            few = "" if len(there) == len(found) else f" ({len(there)} of {len(found)} seeds)"
            if not there:
                lines.append([title, f"{share:.0%}", *"-----"])
                continue
            split = [np.mean([own["macs"][part] / 1e6 for own in there]) for part in ("backbone", "neck", "bbox_head")]
            times = [np.mean([own["ms"][each] for own in there]) for each in ("small", "dense")]
            ap = spread([own["AP"] for own in there]) + few
            lines.append([title, f"{share:.0%}", ap, *(f"{n:.0f}" for n in split), "{:.1f} of {:.1f}".format(*times)])
    headers = ["cut", "of the latency", "AP", "million MACs: backbone", "neck", "head", "ms, detector"]
    return table(headers, lines, "md")


def tuned_table(folders: list[Path], times: dict[str, float]) -> str:
    """Scores of the fine-tuned detectors."""
    lines = []
    for name, (found, seeds) in finished(folders).items():
        after = [own["fine-tuned"]["bbox"] for own in found]
        first = found[0]["backbone"]
        lines.append(
            [
                name + seeds,
                spread([own["sliced"]["bbox"]["AP"] for own in found]),
                *(spread([own[key] for own in after]) for key in ("AP", "AP50", "APs", "APm", "APl")),
                *(spread([own["classes"][each] for own in after]) for each in after[0]["classes"]),
                first["params"],
                first["macs"],
                f"{times[name]:.1f}" if name in times else "-",
            ]
        )
    headers = ["backbone", "AP, sliced", "AP", "AP50", "APs", "APm", "APl", *after[0]["classes"]]
    return table([*headers, "backbone params", "backbone MACs", "ms, detector"], lines, "md")
