"""SiDT's own rows of classification.py, and the ways to select units that were tried beside them."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from cells import Method, Setting, cached, sample
from torch import Tensor, nn
from torch.utils.data import Subset

from sidt import importance as criteria
from sidt.allocation.greedy import Rules, allocate
from sidt.allocation.steps import Slicer, before_last, steps_for
from sidt.allocation.study import search
from sidt.allocation.timing import latencies_for
from sidt.importance.scores import Importance
from sidt.surgery.alignment import align
from sidt.surgery.compensation import compensate, readers
from sidt.surgery.moments import Moments, measure_moments
from sidt.training.evaluation import log_likelihood

TRIALS, HELD_OUT, PARTS, FRESH = 40, 1000, 8, 2500


def _aligned(setting: Setting) -> tuple[nn.Module, Moments]:
    return align(setting.dense, measure_moments(setting.dense, setting.calibration(), space=setting.space))


def _scores(setting: Setting, name: str, score: Callable[[], Importance]) -> tuple[Importance, float]:
    tensors, seconds = cached(
        setting.scratch,
        f"{name}-{setting.seed}",
        lambda: {n: torch.from_numpy(np.array(s)) for n, s in score().scores.items()},
    )
    return Importance(setting.space, {n: s.numpy() for n, s in tensors.items()}), seconds


def _taylor(setting: Setting, aligned: nn.Module) -> tuple[Importance, float]:
    return _scores(
        setting, "aligned Taylor", lambda: criteria.taylor(aligned, setting.calibration(), space=setting.space)
    )


def least_squares(setting: Setting) -> Method:
    """Taylor and least squares in the basis that the model came in."""
    moments = measure_moments(setting.dense, setting.calibration(), space=setting.space)
    scores, seconds = _scores(
        setting, "Taylor (unit)", lambda: criteria.taylor(setting.dense, setting.calibration(), space=setting.space)
    )
    return compensate(setting.dense, allocate(scores, setting.budget), moments), {"earlier_seconds": seconds}


def repaired(setting: Setting) -> Method:
    """Aligned, Taylor, plain ranking, least squares."""
    aligned, moments = _aligned(setting)
    scores, seconds = _taylor(setting, aligned)
    return compensate(aligned, allocate(scores, setting.budget), moments), {"earlier_seconds": seconds}


def searched(setting: Setting) -> Method:
    """The same, with an Optuna search over allocations, repaired in every trial."""
    aligned, moments = _aligned(setting)
    scores, seconds = _taylor(setting, aligned)
    images = setting.holdout(HELD_OUT)
    parts = [Subset(images, range(i, len(images), PARTS)) for i in range(PARTS)]

    def objective(small: nn.Module) -> Iterator[Any]:
        return (log_likelihood(small, part) for part in parts)

    result = search(
        aligned,
        scores,
        setting.budget,
        objective,
        trials=TRIALS,
        seed=setting.seed,
        slicer=lambda plan: compensate(aligned, plan, moments),
        progress=False,
    )
    info = {
        "earlier_seconds": seconds,
        "multipliers": dict(result.multipliers),
        "pruned": result.pruned,
        "plain": result.plain_value,
        "best": result.value,
    }
    return compensate(aligned, result.plan, moments), info


def width(setting: Setting, *, steps: int | None = 1, trials: int = 0, round_to: int = 1) -> Method:
    """The width with the other dimensions: by the plain ranking, or searched; in steps (None: by the budget)."""
    images, rules = list(setting.calibration()), Rules(round_to=round_to)

    def prepare(model: nn.Module) -> tuple[nn.Module, Importance, Slicer]:
        base, moments = align(model, measure_moments(model, images))
        found = criteria.taylor(base, images, space=moments.space)
        return base, found, lambda plan: compensate(base, plan, moments)

    steps = steps or (1 if setting.kind == "latency" else steps_for(setting.budget))
    model, budget = before_last(setting.dense, setting.budget, steps, prepare, rules=rules)
    base, scores, slicer = prepare(model)
    latencies = latencies_for(setting.scratch / "latency", base, scores, budget, rules, click.echo)
    if not trials:
        plan = allocate(scores, budget, **asdict(rules), latencies=latencies)
        return slicer(plan), {"sizes": plan.sizes, "steps": steps}
    held, fresh = setting.holdout(HELD_OUT), sample(setting.data.fresh, FRESH, setting.seed)
    parts = [Subset(held, range(i, HELD_OUT, PARTS)) for i in range(PARTS)]
    result = search(
        base,
        scores,
        budget,
        lambda small: (log_likelihood(small, part) for part in parts),
        fresh=lambda small: log_likelihood(small, fresh),
        trials=trials,
        seed=setting.seed,
        rules=rules,
        latencies=latencies,
        slicer=slicer,
        progress=False,
    )
    assert result.gain is not None
    info = {"sizes": result.plan.sizes, "steps": steps, "gain": [result.gain.difference, result.gain.error]}
    return slicer(result.plan), info


def greedy(setting: Setting) -> Method:
    """v and MLP units scored by the loss that is left after repair, taken out one by one (K-FAC's metric)."""
    aligned, moments = _aligned(setting)
    taylor, seconds = _taylor(setting, aligned)
    found, more = _scores(
        setting,
        "greedy",
        lambda: Importance(setting.space, {**taylor.scores, **_after_repair(setting, aligned, moments)}),
    )
    return compensate(aligned, allocate(found, setting.budget), moments), {"earlier_seconds": seconds + more}


def _after_repair(setting: Setting, model: nn.Module, moments: Moments) -> dict[str, Any]:
    """For every v and MLP unit: half of E[(g dy)^2] when it goes, all that remain refitted, the cheapest first."""
    space, scores = setting.space, {}
    slopes, positions = _slopes(setting, model)
    for name in readers(space):
        (term,) = space.places[name].axes[1]
        dimension = next(s for s in term if isinstance(s, str) and space.dimensions[s].kind in ("v", "mlp"))
        lost = _eliminate(model.get_parameter(name), moments.read_by(name), slopes[name]) * positions[name] / 2
        parent = space.dimensions[dimension].per
        scores[dimension] = (lost if parent is None else lost.view(space.sizes[parent], -1)).numpy()
    return scores


def _slopes(setting: Setting, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Mean of g g^T over positions, of the loss's gradient by what each reader writes; and positions an image."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    images = 0

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, __: Any, grads: Any) -> None:
            g = grads[0].detach().flatten(0, -2).double()
            totals[name] = totals.get(name, torch.zeros(())) + g.T @ g
            counts[name] = counts.get(name, 0) + len(g)

        return add

    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_full_backward_hook(hook(name))
        for name in readers(setting.space)
    ]
    for x, y in setting.calibration():
        F.cross_entropy(model(x), y, reduction="sum").backward()
        images += len(y)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {n: t / counts[n] for n, t in totals.items()}, {n: c // images for n, c in counts.items()}


def _eliminate(weight: Tensor, moment: Tensor, slope: Tensor) -> Tensor:
    """Optimal Brain Surgeon's greedy: what each column costs when it is taken out, the others refitted each time."""
    columns = weight.shape[1]
    whole = torch.cat([weight.detach().double(), torch.zeros(len(weight), 1, dtype=torch.float64)], 1)
    ridge = 1e-4 * moment.diagonal().mean() * torch.eye(columns + 1, dtype=torch.float64)
    inverse, cost = torch.linalg.inv(moment + ridge), torch.zeros(columns, dtype=torch.float64)
    gone = torch.zeros(columns + 1, dtype=torch.bool)
    gone[-1] = True  # the bias stays
    for _ in range(columns):
        each = ((slope @ whole) * whole).sum(0) / inverse.diagonal().clamp(min=1e-30)
        each[gone] = torch.inf
        unit = int(each.argmin())
        cost[unit], row = each[unit], inverse[unit] / inverse[unit, unit]
        whole = whole - torch.outer(whole[:, unit], row)
        inverse = inverse - torch.outer(inverse[:, unit], row)
        gone[unit] = True
    return cost
