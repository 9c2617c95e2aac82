"""Which layers pay: what a plan does to the time of each, beside its multiply-adds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from sidt.allocation.timing import ROUNDS, time_plans, timed_layers
from sidt.cost.complexity import report
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace
from sidt.space.trace import Forward

_PAYS = 1.1  # a layer pays if its latency shrinks as its multiply-adds do, to this factor


@dataclass(frozen=True)
class LayerTime:
    """What a plan does to one layer, or to the whole model.

    Attributes:
        name: the module; "(rest)" for what is in none, "(model)" for all.
        dense_ms: its median milliseconds in the dense model.
        sliced_ms: in the sliced one.
        latency: the part that is left, the median of rounds in which both were timed.
        macs: the part of its multiply-adds that is left.
        pays: whether the first is at most 1.1 times the second in at least a quarter of the rounds.
    """

    name: str
    dense_ms: float
    sliced_ms: float
    latency: float
    macs: float
    pays: bool


def compare_layers(
    model: nn.Module,
    plan: DimensionPlan,
    *,
    batch: int = 1,
    rounds: int = 2 * ROUNDS,
    forward: Forward = nn.Module.__call__,
    progress: bool = True,
) -> list[LayerTime]:
    """Time a dense model and its sliced one in turn, layer by layer, beside their multiply-adds.

    Args:
        model: the dense model; it is not changed.
        plan: what to slice it by.
        batch: images of a forward.
        rounds: how often both are timed.
        forward: runs a model on a batch of images.
        progress: whether to show a progress bar.

    Returns:
        A row for each layer that dimensions live in, one for the rest and one for the whole.
    """
    space, both = plan.space, [DimensionPlan(plan.space, {}), plan]
    names = list(timed_layers(model, space, forward))
    seen = time_plans(model, both, names, batch=batch, rounds=rounds, forward=forward, progress=progress).min(axis=2)
    whole, inside = seen[..., :1], seen[..., 1:]
    times = np.concatenate([inside, whole - inside.sum(axis=-1, keepdims=True), whole], axis=-1)
    macs = np.array([macs_of(space, names, p.sizes) for p in both])
    rows = []
    for i, name in enumerate([*names, "(rest)", "(model)"]):
        dense, sliced = times[:, 0, i], times[:, 1, i]
        left = sliced / dense
        share = float(macs[1, i] / macs[0, i]) if macs[0, i] else 1.0
        pays = bool(np.quantile(left, 0.25) <= _PAYS * share)
        latency = float(np.median(left))
        rows.append(LayerTime(name, float(np.median(dense)), float(np.median(sliced)), latency, share, pays))
    return rows


def macs_of(space: DimensionSpace, names: Sequence[str], sizes: Mapping[str, int]) -> list[int]:
    """Multiply-adds of some modules, of the rest, and of all."""
    rows = report(space, sizes).rows
    inside = [sum(r.macs for r in rows if r.name == n or r.name.startswith(f"{n}.")) for n in names]
    total = sum(r.macs for r in rows)
    return [*inside, total - sum(inside), total]
