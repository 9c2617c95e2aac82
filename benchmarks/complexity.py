"""How many plans a second each way of counting costs, what each counts, and how long SiDT takes to start.

    python benchmarks/complexity.py [--model deit_small_patch16_224] [--seconds 5]

SiDT counts a plan in closed form. The other counters need the sliced model: it is built beforehand, and its
building is timed on its own. Everything runs in one process, in turn, for REPEATS rounds.
"""

import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
from results import environment, write_results
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sidt.cost.complexity import PlanCosts, cost_terms, measure, report
from sidt.report.tables import table
from sidt.space.axes import Array
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import meta_copy
from sidt.surgery.slicing import slice_model

HERE = Path(__file__).parent
REPEATS, PLANS, SLICED, STARTS = 5, 10_000, 3, 10
GOAL = 100_000
CUTS = {  # the share that each kind keeps, in the models of the second table
    "dense": {},
    "heads 2/3": {"heads": 2 / 3},
    "q/k 1/2, others 3/4": {"heads": 0.75, "qk": 0.5, "v": 0.75, "mlp": 0.75, "width": 0.75},
}

Count = tuple[int | None, int]  # parameters where the counter gives them, multiply-adds


def optional(name: str) -> Any:
    """A module of the dependency group ``benchmarks``."""
    try:
        return import_module(name)
    except ImportError:
        raise click.ClickException(f"{name} is not installed: uv sync --group benchmarks") from None


def count_torch(model: nn.Module, image: Tensor, *, math: bool) -> Count:
    counter = FlopCounterMode(display=False)
    backend = sdpa_kernel(SDPBackend.MATH) if math else nullcontext()
    with torch.no_grad(), backend, counter:
        model(image)
    return None, counter.get_total_flops() // 2


def count_fvcore(model: nn.Module, image: Tensor) -> Count:
    fvcore = optional("fvcore.nn")
    analysis = fvcore.FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
    macs = analysis.uncalled_modules_warnings(False).tracer_warnings("none").total()
    return fvcore.parameter_count(model)[""], int(macs)


def count_torch_pruning(model: nn.Module, image: Tensor) -> Count:
    macs, params = optional("torch_pruning").utils.count_ops_and_params(model, image)
    return int(params), int(macs)


def count_sidt(model: nn.Module, image: Tensor) -> Count:
    seen = measure(model, tuple(image.shape[1:]))
    return seen.params, seen.macs


COUNTERS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Count]]] = {
    "SiDT measure (any model)": ("cpu", count_sidt),
    "torch flop_counter, CPU": ("cpu", partial(count_torch, math=False)),
    "torch flop_counter, CPU, sdpa MATH": ("cpu", partial(count_torch, math=True)),
    "torch flop_counter, meta": ("meta", partial(count_torch, math=False)),
    "torch flop_counter, meta, sdpa MATH": ("meta", partial(count_torch, math=True)),
    "fvcore FlopCountAnalysis": ("cpu", count_fvcore),
    "Torch-Pruning count_ops_and_params": ("cpu", count_torch_pruning),
}


def plan_of(space: DimensionSpace, sizes: dict[str, int]) -> DimensionPlan:
    """The plan that keeps the first units; which ones makes no difference to the cost."""
    rows = {name: (sizes[parent],) for name, parent in space.per.items()}
    return DimensionPlan(space, {n: np.broadcast_to(np.arange(s), (*rows.get(n, ()), s)) for n, s in sizes.items()})


def random_sizes(space: DimensionSpace, count: int) -> Array:
    """Uniform sizes of every dimension that may shrink, shape [count, dimensions]."""
    high = np.array([d.size for d in space.dimensions.values()])
    low = np.array([d.size if d.fixed else 1 for d in space.dimensions.values()])
    return np.random.default_rng(0).integers(low, high + 1, (count, len(high)))


def attention_macs(space: DimensionSpace, sizes: dict[str, int]) -> int:
    owners = set(space.attention.values())
    terms = [t for t in cost_terms(space) if t.module in owners and not t.params]
    return sum(t.macs * int(np.prod([sizes[n] for n in t.dimensions])) for t in terms)


Step = Callable[[], int]  # does some work and says how many plans that were


def rates(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Plans a second of every step, one number a round, the steps in turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up
    for _ in range(REPEATS):
        for name, step in steps.items():
            done, start = 0, time.perf_counter()
            while (taken := time.perf_counter() - start) < seconds / REPEATS:
                done += step()
            found[name].append(done / taken)
    return found


def each_of(items: list[Any], do: Callable[[Any], Any]) -> Step:
    def step() -> int:
        for item in items:
            do(item)
        return len(items)

    return step


def batch_of(costs: PlanCosts, sizes: Array) -> Step:
    def step() -> int:
        costs.of(sizes)
        return len(sizes)

    return step


def speed(model: nn.Module, space: DimensionSpace, seconds: float) -> tuple[dict[str, list[float]], bool]:
    """Plans a second of every counter; and whether SiDT predicts the sliced models' cost exactly."""
    costs, sizes = PlanCosts(space), random_sizes(space, PLANS)
    few = [dict(zip(costs.names, map(int, row), strict=True)) for row in sizes[:SLICED]]
    plans, meta = [plan_of(space, chosen) for chosen in few], meta_copy(model)
    image = torch.randn(1, *space.trace.input_size)
    built = {"cpu": [slice_model(model, p).eval() for p in plans], "meta": [slice_model(meta, p) for p in plans]}
    exact = [count_sidt(m, image) for m in built["cpu"]] == [tuple(r) for r in costs.of(sizes[:SLICED]).tolist()]
    steps: dict[str, Step] = {
        f"SiDT PlanCosts, {PLANS:,} plans at once": batch_of(costs, sizes),
        "SiDT PlanCosts, 100 plans at once": batch_of(costs, sizes[:100]),
        "SiDT PlanCosts, one by one": each_of(list(sizes[:100]), costs.of),
        "SiDT report, per module, one by one": each_of(few, partial(report, space)),
    }
    for name, (device, count) in COUNTERS.items():
        steps[name] = each_of(built[device], partial(lambda m, count, i: count(m, i), count=count, i=image.to(device)))
    steps["(building the sliced model, CPU)"] = each_of(plans, partial(slice_model, model))
    steps["(building the sliced model, meta)"] = each_of(plans, partial(slice_model, meta))
    steps["(space_for, once for a model)"] = each_of([model], space_for)
    return rates(steps, seconds), exact


def counts(model: nn.Module, space: DimensionSpace) -> list[dict[str, Any]]:
    """What every counter says of the dense model and of sliced ones, beside SiDT's prediction."""
    costs, image = PlanCosts(space), torch.randn(1, *space.trace.input_size)
    found: list[dict[str, Any]] = [{"counter": name} for name in ("SiDT prediction", *COUNTERS)]
    for label, kept in CUTS.items():
        sizes = {n: d.size if d.fixed else int(d.size * kept.get(d.kind, 1)) for n, d in space.dimensions.items()}
        predicted = costs.of(np.array([sizes[n] for n in costs.names])).tolist()
        sliced = slice_model(model, plan_of(space, sizes)).eval()
        models = {"cpu": sliced, "meta": meta_copy(sliced)}
        for row in found:
            params, macs = predicted
            if row["counter"] in COUNTERS:
                device, count = COUNTERS[row["counter"]]
                params, macs = count(models[device], image.to(device))
            # Elementwise operations, which some count, are far below half of what attention multiplies.
            attention = macs > predicted[1] - attention_macs(space, sizes) / 2
            row[label] = {"params": params, "macs": macs, "attention": attention}
    return found


def cold_starts() -> dict[str, list[float]]:
    """Seconds of each command in a fresh process, in turn."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        'python -c "import sidt"': [sys.executable, "-c", "import sidt"],
        "sidt --help": [str(Path(sys.executable).with_name("sidt")), "--help"],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(STARTS + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if repeat:  # the first fills the disk cache
                found[name].append(time.perf_counter() - start)
    return found


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def speed_table(found: dict[str, list[float]]) -> str:
    rows = []
    for name, values in found.items():
        median = statistics.median(values)
        rows.append([name, _rate(median), f"{_rate(min(values))} - {_rate(max(values))}", f"{1e3 / median:.4g}"])
    return table(["counter", "plans/s", "min - max", "ms a plan"], rows, "md")


def counts_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for row in found:
        cells: list[Any] = [row["counter"]]
        for seen in (row[label] for label in CUTS):
            missing = "" if seen["attention"] else ", no attention"
            params = "-" if seen["params"] is None else f"{seen['params']:,}"
            cells += [params, f"{seen['macs'] / 1e9:.3f}{missing}"]
        rows.append(cells)
    headers = [f"{label}: {column}" for label in CUTS for column in ("params", "GMACs")]
    return table(["counter", *headers], rows, "md")


def starts_table(found: dict[str, list[float]]) -> str:
    rows = []
    bare = statistics.median(next(iter(found.values())))
    for name, values in found.items():
        median = statistics.median(values)
        rows.append([name, f"{median:.3f}", f"{min(values):.3f} - {max(values):.3f}", f"{median - bare:+.3f}"])
    return table(["command", "seconds", "min - max", "beside python -c pass"], rows, "md")


@click.command()
@click.option("--model", "name", default="deit_small_patch16_224", show_default=True, help="A timm model.")
@click.option("--seconds", default=5.0, show_default=True, help="For each row of the first table.")
@click.option("--out", default=str(HERE / "results" / "complexity"), type=click.Path(path_type=Path))
def main(name: str, seconds: float, out: Path) -> None:
    """Measure, then write the results."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    starts = cold_starts()  # first, before this process is large
    model = timm.create_model(name, pretrained=False).eval()
    space = space_for(model)
    counted = counts(model, space)
    found, exact = speed(model, space, seconds)
    best = statistics.median(next(iter(found.values())))
    text = f"""## Plans a second

{speed_table(found)}

Median of {REPEATS} rounds, all rows in turn in one process. Goal of {GOAL:,} plans/s on 2 cores: {best:,.0f}
({best / GOAL:.2f} of it). NumPy's whole-number arithmetic uses one core. SiDT's closed form takes the sizes of
random plans; the other counters take models already sliced by {SLICED} of these plans, and their building
(in brackets) comes on top. SiDT's prediction {"equals" if exact else "DIFFERS FROM"} what is counted on these
sliced models, to the last multiply-add.

## What is counted

{counts_table(counted)}

"No attention": the two matrix products of scaled_dot_product_attention are not in the number (timm's fused
attention as it is). Torch's counter gives multiply-adds times two, halved here; it does not know the CPU's fused
kernel, which runs wherever q/k and v have one size, so there it needs sdpa_kernel(SDPBackend.MATH). fvcore has no
handle for scaled_dot_product_attention, whatever the kernel. Torch-Pruning counts an attention only if its class
is timm's own, by a formula: it takes the output projection for square, so with pruned heads it counts too little,
and it cannot see the class that SiDT gives an attention whose q/k or v are pruned. fvcore also counts norms;
Torch-Pruning norms, activations, softmax and biases.

## Cold start

{starts_table(starts)}

Median of {STARTS} fresh processes, in turn. Goal: less than 0.3 s beside `python -c pass`."""
    data = {"model": name, "plans_per_second": found, "exact": exact, "counts": counted, "cold_start_seconds": starts}
    write_results(out, f"Complexity counting, {name}", environment(), text, data)
    click.echo(text)


if __name__ == "__main__":
    main()
