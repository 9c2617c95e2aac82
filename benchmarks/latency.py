"""Whether latency follows multiply-adds: sliced models beside the dense one, timed in turn, layer by layer.

    OMP_NUM_THREADS=1 python benchmarks/latency.py [--batches 1,8] [--rounds 7] [--device cuda]

With one thread the clock is the thread's own, so other programs on the machine show less. Weights and scores are
random: time depends on sizes alone.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import numpy.typing as npt
import timm
import torch.nn.functional as F
from results import environment, write_results
from torch import Tensor, nn

from sidt import Budget, DimensionPlan, allocate, importance, space_for
from sidt.allocation.greedy import uniform
from sidt.allocation.timing import fit_latency, measure_layers, time_plans, timed_layers
from sidt.cost.clock import whereabouts
from sidt.cost.complexity import report
from sidt.cost.latency import LayerLatencies
from sidt.importance.scores import Importance
from sidt.report.tables import table
from sidt.space.space import DimensionSpace

HERE = Path(__file__).parent
MODELS = "deit_small_patch16_224,swin_tiny_patch4_window7_224"
LEFT, GOAL = 0.6, 1.10
SIZES_ONLY = ("qk", "v", "mlp")
BEFORE = "q/k, v, mlp; two sizes as they are"
LATENCY = f"latency={LEFT}"

ABOUT = f"""40 % fewer multiply-adds, or, in the last row, 40 % less time by the table of measured layers. Goal: what
is left of the time is at most {GOAL:.2f} times what is left of the MACs. Scores are random with a fixed seed. "Heads
too" allocates over heads, q/k, v and mlp (random scores remove whole heads first); "q/k, v, mlp" keeps the heads;
"uniform" shrinks these three alike. "{BEFORE}" is the plan below it with attention left to torch,
whose fused kernel for CPU takes q/k and v of one size only; SiDT fills the smaller up with zeros.

Dense and sliced models in turn in one process, {{rounds}} rounds, each the better of two forwards after a warm-up.
"Time left": median over the rounds of sliced / dense of the same round; "of minima" divides the least times of all
rounds. "By the table" is what the table of layers said before it was fitted. A layer does not pay if its time left is
more than {GOAL:.2f} times its MACs left in at least three rounds of four."""

Float = npt.NDArray[np.float64]


def as_it_was(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, scale: float) -> Tensor:
    """Attention of q/k and v of two sizes, left to torch."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def plans_of(scores: Importance) -> dict[str, DimensionPlan]:
    """Plans with 40 % fewer multiply-adds."""
    budget = Budget(macs=LEFT)
    plans = {"uniform": uniform(scores.space, budget)}
    for what, kinds in {"q/k, v, mlp": SIZES_ONLY, "heads too": (*SIZES_ONLY, "heads")}.items():
        for step in (1, 8, 16, 32):
            name = f"{what}; round_to={step}" if step > 1 else what
            plans[name] = allocate(scores, budget, kinds=kinds, round_to=step)
    return plans


def macs_by_group(space: DimensionSpace, groups: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, int]:
    """Multiply-adds of attentions, of MLPs, of the rest and of all."""
    rows = report(space, sizes).rows
    found = {g: sum(r.macs for r in rows for n in ns if f"{r.name}.".startswith(f"{n}.")) for g, ns in groups.items()}
    total = sum(row.macs for row in rows)
    return found | {"rest": total - sum(found.values()), "all": total}


def times_by_group(seen: Float, names: list[str], groups: Mapping[str, list[str]]) -> dict[str, Float]:
    """Milliseconds of the same, the best forward of each round; shape [rounds, plans]."""
    best = seen.min(axis=2)
    found = {g: best[..., [1 + names.index(n) for n in ns]].sum(axis=-1) for g, ns in groups.items()}
    return found | {"rest": best[..., 0] - sum(found.values()), "all": best[..., 0]}


def lazy_layers(seen: Float, names: list[str], members: list[str], column: int, plan: DimensionPlan) -> dict[str, bool]:
    """For each layer of a group, whether its time shrinks less than its multiply-adds."""
    found, best = {}, seen.min(axis=2)
    for layer in members:
        macs = [macs_by_group(plan.space, {"": [layer]}, sizes)[""] for sizes in (plan.space.sizes, plan.sizes)]
        own = best[..., 1 + names.index(layer)]
        found[layer] = bool(np.quantile(own[:, column] / own[:, 0], 0.25) > GOAL * macs[1] / macs[0])
    return found


def measure(name: str, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """All plans of one model at one batch size."""
    model = timm.create_model(name).eval().to(device)
    space = space_for(model)
    scores = importance.random(model, seed=0, space=space)
    layers = timed_layers(model, space, nn.Module.__call__)
    names, mlps = list(layers), {d.name for d in space.dimensions.values() if d.kind == "mlp"}
    groups: dict[str, list[str]] = {"attention": [], "mlp": []}
    for layer, (_, dims) in layers.items():
        groups["mlp" if mlps & set(dims) else "attention"].append(layer)

    plans = {"dense": DimensionPlan(space, {})} | plans_of(scores)
    tables = measure_layers(model, space, batch=batch, rounds=max(2, rounds // 2), say=click.echo)
    fitted = fit_latency(model, scores, Budget(latency=LEFT), tables, rounds=rounds, say=click.echo)
    plans[LATENCY] = allocate(scores, Budget(latency=LEFT), latencies=fitted)
    seen = time_plans(model, list(plans.values()), names, batch=batch, rounds=rounds)
    with patch("sidt.surgery.attention.attend", as_it_was):
        pair = [plans["dense"], plans["q/k, v, mlp"]]
        before = time_plans(model, pair, names, batch=batch, rounds=rounds)
    dense = macs_by_group(space, groups, space.sizes)
    rows = {}
    cases = [(label, plan, seen, i) for i, (label, plan) in enumerate(plans.items())]
    cases.insert(2, (BEFORE, plans["q/k, v, mlp"], before, 1))
    for label, plan, times, column in cases:
        by_group, macs = times_by_group(times, names, groups), macs_by_group(space, groups, plan.sizes)
        rows[label] = {
            group: {
                "ms": [float(t) for t in own[:, column]],
                "left": [float(t) for t in own[:, column] / own[:, 0]],
                "left_of_minima": float(own[:, column].min() / own[:, 0].min()),
                "macs_left": macs[group] / dense[group] if dense[group] else 1.0,
            }
            for group, own in by_group.items()
        }
        rows[label]["predicted"] = tables.milliseconds(plan.sizes) / tables.dense_ms
        rows[label]["lazy"] = {g: lazy_layers(times, names, ns, column, plan) for g, ns in groups.items()}
    return {"rows": rows, "where": whereabouts(model, space, batch), "table": as_facts(tables, fitted)}


def as_facts(tables: LayerLatencies, fitted: LayerLatencies) -> dict[str, Any]:
    """What the tables say, for the file of results."""
    return {"tables": tables.to_json()["tables"], "dense_ms": tables.dense_ms, "realised": fitted.realised}


def whole_table(found: dict[str, Any]) -> str:
    """Whole models: time beside multiply-adds."""
    cells = []
    for label, row in found["rows"].items():
        own = row["all"]
        left, macs = statistics.median(own["left"]), own["macs_left"]
        cells.append(
            [
                label,
                f"{statistics.median(own['ms']):.1f}",
                f"{min(own['ms']):.1f} - {max(own['ms']):.1f}",
                f"{macs:.3f}",
                f"{left:.3f}",
                f"{row['predicted']:.3f}",
                f"{left / macs:.3f}",
                f"{own['left_of_minima'] / macs:.3f}",
            ]
        )
    headers = ["plan", "ms", "min - max", "MACs left", "time left", "by the table", "time / MACs", "of minima"]
    return table(headers, cells, "md")


def parts_table(found: dict[str, Any]) -> str:
    """Attentions, MLPs and the rest: time left / multiply-adds left."""
    cells = []
    for label, row in found["rows"].items():
        parts = [row[group] for group in ("attention", "mlp", "rest")]
        texts = [f"{statistics.median(p['left']):.3f} / {p['macs_left']:.3f}" for p in parts]
        lazy = [f"{group} {_indices(own)}" for group, own in row["lazy"].items() if any(own.values())]
        share = statistics.median(row["rest"]["ms"]) / statistics.median(row["all"]["ms"])
        cells.append([label, *texts, f"{share:.0%}", ", ".join(lazy) or "-"])
    headers = ["plan", "attention: time / MACs left", "mlp", "rest", "rest, of the time", "do not pay"]
    return table(headers, cells, "md")


def _indices(lazy: dict[str, bool]) -> str:
    """Which blocks' layers do not pay, as ``block`` or ``stage.block``."""
    named = [".".join(part for part in name.split(".") if part.isdigit()) for name, is_so in lazy.items() if is_so]
    return "in every block" if len(named) == len(lazy) else ", ".join(named)


def verdict(found: dict[str, Any]) -> str:
    """Which plans meet the goal."""
    rows = {label: row["all"] for label, row in found["rows"].items() if label not in ("dense", BEFORE)}
    ratios = {label: statistics.median(own["left"]) / own["macs_left"] for label, own in rows.items()}
    missed = [f"{label} ({ratio:.3f})" for label, ratio in ratios.items() if ratio > GOAL]
    bound = statistics.median(rows[LATENCY]["left"])
    says = f"Not within {GOAL:.2f}: {', '.join(missed)}" if missed else f"Every plan is within {GOAL:.2f}"
    return f"{says}. The latency budget of {LEFT} was measured as {bound:.3f}."


def section(title: str, found: dict[str, Any]) -> str:
    """All that is said of one model at one batch size."""
    tables = f"{whole_table(found)}\n\n{verdict(found)}\n\n{parts_table(found)}"
    where = found["where"]
    return f"## {title} on {where['machine']} (clock: {where['clock']})\n\n{tables}"


@click.command()
@click.option("--models", default=MODELS, show_default=True)
@click.option("--batches", default="1,8", show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", default=str(HERE / "results" / "latency"), type=click.Path(path_type=Path))
def main(models: str, batches: str, rounds: int, device: str, out: Path) -> None:
    """Measure, then write the results."""
    data: dict[str, Any] = {}
    text = [ABOUT.format(rounds=rounds)]
    for name in models.split(","):
        for batch in map(int, batches.split(",")):
            found = measure(name, batch, rounds, device)
            data[f"{name}, batch {batch}"] = found
            text.append(section(f"{name}, batch {batch}", found))
            click.echo(text[-1])
            write_results(out, "Latency beside multiply-adds", environment(), "\n\n".join(text), data)


if __name__ == "__main__":
    main()
