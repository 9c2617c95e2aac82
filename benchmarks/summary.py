"""What the cells of the classification benchmark say together: means over seeds, tables, and the picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import RIVALS, Cell
from matplotlib.figure import Figure

from sidt.files import read_json, replacing
from sidt.report.tables import table

Results = dict[str, list[dict[str, Any]]]  # of every seed, by learning rate
OURS, _NAMES = ("SiDT", "SiDT repair"), {"params": "parameters", "macs": "MACs", "latency": "time at batch 1"}
_DRAWN = ("SiDT", "ModelOpt FastNAS", "CORP", "VBP", "Torch-Pruning")


def collected(cells: Sequence[Cell], runs: Path) -> dict[tuple[str, str, float], dict[str, Results]]:
    """The cells that are there, by row and target, then by step."""
    rows: dict[tuple[str, str, float], dict[str, Results]] = {}
    for cell in cells:
        steps = rows.setdefault((cell.row, cell.kind, cell.share), {})
        steps.setdefault(cell.step, {}).setdefault(f"{cell.lr:g}", []).append(read_json(cell.file(runs)))
    return rows


def summary(rows: dict[tuple[str, str, float], dict[str, Results]], timed: dict[str, Any]) -> list[dict[str, Any]]:
    """For every row and target: means over the seeds, by step."""
    summed = []
    for (row, kind, share), steps in rows.items():
        each = steps["no training"]["0"]
        good = [result for result in each if "failed" not in result]
        found: dict[str, Any] = {"row": row, "kind": kind, "share": share}
        if not good:
            summed.append(found | {"failed": each[0]["failed"]})
            continue
        found |= {key: float(np.mean([result[key] for result in good])) for key in ("params", "macs", "seconds")}
        found |= {"info": [result["info"] for result in good], "latency_ms": timed.get(label(row, kind, share))}
        found["seeds_failed"] = len(each) - len(good)
        found["top1"] = {step: _mean(*_best(results)) for step, results in steps.items() if _best(results)}
        summed.append(found)
    return summed


def margins(rows: dict[tuple[str, str, float], dict[str, Results]]) -> str:
    """A markdown table: how far SiDT's row is above the best rival and above the dense model, image by image."""
    dense, lines = rows["dense", "params", 1.0], []
    for (row, kind, share), steps in rows.items():
        if row not in OURS:
            continue
        rivals = {name: rows[name, kind, share] for name in RIVALS if (name, kind, share) in rows}
        for step, results in steps.items():
            theirs = {name: found for name, each in rivals.items() if (found := _best(each.get(step, {})))}
            mine, whole = _best(results), _best(dense.get(step, {}))
            if not mine or not theirs:
                continue
            best = max(theirs, key=lambda name: _hits(theirs[name][1]).mean())
            above = [_above(mine[1], other[1]) if other else "-" for other in (theirs[best], whole)]
            lines.append([f"{share:.0%} of the {_NAMES[kind]}", step, row, best, *above])
    headers = ["left", "step", "", "the best rival", "above it", "above dense, trained alike"]
    return table(headers, lines, "md")


def _above(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    difference = _hits(mine) - _hits(other)
    return f"{100 * difference.mean():+.1f} +- {100 * difference.std() / np.sqrt(len(difference)):.1f}"


def _best(results: Results) -> tuple[float, list[dict[str, Any]], dict[str, float]] | None:
    """The learning rate that was best with the first seed, its results, and what the first seed gave at each rate."""
    good = {lr: each for lr, each in results.items() if "failed" not in each[0]}
    first = {lr: each[0]["top1"] for lr, each in good.items()}
    best = max(first, key=lambda lr: first[lr], default=None)
    return None if best is None else (float(best), [r for r in good[best] if "failed" not in r], first)


def _mean(lr: float, good: list[dict[str, Any]], rates: dict[str, float]) -> dict[str, Any]:
    """Mean over seeds, its standard error over the test images, and the standard deviation over seeds."""
    hits, each = _hits(good), [result["top1"] for result in good]
    spread = float(np.std(each, ddof=1)) if len(each) > 1 else None
    error = float(hits.std() / np.sqrt(len(hits)))
    return {"mean": float(hits.mean()), "error": error, "sd": spread, "each": each, "lr": lr, "rates": rates}


def _hits(results: list[dict[str, Any]]) -> np.ndarray:
    """The part of the seeds that were right, for every test image."""
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(r["hits"]), np.uint8))[: r["n"]] for r in results]
    return np.mean(bits, axis=0)


def label(row: str, kind: str, share: float) -> str:
    """The name of a model among the timed ones."""
    return f"{row} {kind} {share:g}"


def tables(rows: list[dict[str, Any]]) -> str:
    """A markdown table for every target, the dense model in each, best first, and what failed."""
    dense = next(row for row in rows if row["row"] == "dense")
    steps = list(dict.fromkeys(step for row in rows for step in row.get("top1", {})))
    texts = []
    for kind, share in dict.fromkeys((row["kind"], row["share"]) for row in rows if row["row"] != "dense"):
        here = [row for row in rows if (row["kind"], row["share"]) == (kind, share) and row["row"] != "dense"]
        done = sorted((r for r in here if "top1" in r), key=lambda r: -r["top1"]["no training"]["mean"])
        headers = ["", *(f"top-1, {step}" for step in steps), "params", "MACs", "method (s)", "ms, 1", "ms, 32"]
        lines = [
            [
                row["row"] + (f" ({row['seeds_failed']} seeds failed)" if row["seeds_failed"] else ""),
                *(_percent(row["top1"].get(step)) for step in steps),
                *(f"{row[key]:,.0f} ({row[key] / dense[key]:.1%})" for key in ("params", "macs")),
                f"{row['seconds']:.0f}",
                *(f"{row['latency_ms'][n]:.1f}" if row["latency_ms"] else "-" for n in ("1", "32")),
            ]
            for row in [dense, *done]
        ]
        failed = [f"- {row['row']}: {row['failed']}" for row in here if "failed" in row]
        texts.append("\n\n".join([f"## {share:.0%} of the {_NAMES[kind]}", table(headers, lines, "md"), *failed]))
    return "\n\n".join(texts)


def _percent(top1: dict[str, Any] | None) -> str:
    if top1 is None:
        return "-"
    seeds = f" (sd {100 * top1['sd']:.1f})" if top1["sd"] is not None else ""
    rate = f" at {top1['lr']:g}" if top1["lr"] else ""
    return f"{100 * top1['mean']:.1f} +- {100 * top1['error']:.1f}{seeds}{rate}"


def gains(rows: list[dict[str, Any]]) -> str:
    """A markdown table: the log-likelihood on fresh images that the search gained over the plain ranking, by seed."""
    lines = []
    for row in rows:
        found = [(info["gain"], info["steps"]) for info in row.get("info", []) if "gain" in info]
        if found:
            each = " / ".join(f"{gain:+.3f} +- {error:.3f}" for (gain, error), _ in found)
            lines.append([f"{row['share']:.0%} of the {_NAMES[row['kind']]}", row["row"], str(found[0][1]), each])
    return table(["left", "", "steps", "gain +- one standard error, by seed"], lines, "md")


def fastest(rows: list[dict[str, Any]]) -> str:
    """A markdown table: for each rival's model, the least measured time of a SiDT model of no lower top-1."""

    def choose(mine: list[dict[str, Any]], rival: dict[str, Any], batch: str) -> dict[str, Any] | None:
        good = (row for row in mine if _top1(row) >= _top1(rival))
        return min(good, key=lambda row: row["latency_ms"][batch], default=None)

    return _beside(rows, choose, "faster", lambda r, m, b: f"{r['latency_ms'][b] / m['latency_ms'][b]:.2f}x")


def best_in_time(rows: list[dict[str, Any]]) -> str:
    """A markdown table: for each rival's model, the highest top-1 of a SiDT model that was measured no slower."""

    def choose(mine: list[dict[str, Any]], rival: dict[str, Any], batch: str) -> dict[str, Any] | None:
        return max(
            (row for row in mine if row["latency_ms"][batch] <= rival["latency_ms"][batch]), key=_top1, default=None
        )

    return _beside(rows, choose, "above it", lambda r, m, _: f"{100 * (_top1(m) - _top1(r)):+.1f}")


def _beside(rows: list[dict[str, Any]], choose: Callable[..., Any], title: str, gain: Callable[..., str]) -> str:
    timed = [row for row in rows if row.get("latency_ms")]
    mine, lines = [row for row in timed if row["row"].startswith("SiDT")], []
    for rival in sorted((row for row in timed if row["row"] in RIVALS), key=_top1, reverse=True):
        line = [f"{rival['row']}, {rival['share']:.0%} of the {_NAMES[rival['kind']]}", f"{100 * _top1(rival):.1f}"]
        for batch in ("1", "32"):
            line.append(f"{rival['latency_ms'][batch]:.1f}")
            best = choose(mine, rival, batch)
            if best is None:
                line += ["-", "-"]
                continue
            name = f"{best['row']}, {best['share']:.0%} of the {_NAMES[best['kind']]}, {100 * _top1(best):.1f}"
            line += [f"{best['latency_ms'][batch]:.1f} ({name})", gain(rival, best, batch)]
        lines.append(line)
    batches = (f"{head}, batch {batch}" for batch in (1, 32) for head in ("ms", "SiDT", title))
    return table(["the rival's model", "its top-1", *batches], lines, "md")


def _top1(row: dict[str, Any]) -> float:
    return float(row["top1"]["no training"]["mean"])


def draw(results: Path, picture: Path) -> None:
    """Top-1 with no training against the parameters left and, where it was measured, against the time of a forward."""
    rows = read_json(results)["results"]["rows"]
    dense = next(row for row in rows if row["row"] == "dense")
    panels = {"parameters left (%)": lambda row: 100 * row["params"] / dense["params"]}
    if dense["latency_ms"]:
        panels["ms, 32 images"] = lambda row: row["latency_ms"]["32"]
    figure = Figure(figsize=(0.8 + 4.6 * len(panels), 4.2), layout="constrained")
    for axes, (title, place) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, name in enumerate(_DRAWN):
            points = [r for r in rows if r["row"] == name and r["kind"] == "params" and "top1" in r]
            points = sorted((r for r in [*points, dense] if r["latency_ms"] or len(panels) == 1), key=place)
            if len(points) == 1:
                continue
            means, errors = ([100 * r["top1"]["no training"][key] for r in points] for key in ("mean", "error"))
            axes.errorbar([place(r) for r in points], means, errors, color=f"C{number}", marker="o", markersize=4)
            last = points[0]
            axes.annotate(name, (place(last), means[0]), (4, -10), textcoords="offset points", color=f"C{number}")
        axes.axhline(100 * dense["top1"]["no training"]["mean"], linestyle=":", color="black")
        axes.set_xlabel(title)
        axes.set_ylabel("top-1 (%), no training")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=150)
