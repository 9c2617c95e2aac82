"""The curve of a Pareto search: score against what may stay of the dense model's cost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isclose

import numpy as np

from sidt.allocation.greedy import Rules, allocate
from sidt.allocation.knobs import WIDTH
from sidt.cost.budget import BOUNDS, Budget
from sidt.cost.complexity import PlanCosts
from sidt.cost.latency import LayerLatencies
from sidt.errors import InputError
from sidt.importance.scores import Importance

# Where a search starts, by the plain ranking and with less width; it goes from the least that can be reached to 1.
_SHARES, _NARROWER = (0.6, 0.4, 0.25, 0.15, 0.1, 0.05), -0.5
_SAME = 1e-3
_APART = 1.05  # corners nearer than this ratio are one


@dataclass(frozen=True)
class Point:
    """A point of the curve that Pareto mode finds.

    Attributes:
        value: mean score on the held-out data.
        share: the part of the dense model's cost that may stay, of what the budget bounds.
        params: parameters.
        macs: multiply-adds.
        knobs: of the trial: with them :func:`sidt.allocation.plan_at` gives a plan at any budget near this one.
    """

    value: float
    share: float
    params: int
    macs: int
    knobs: Mapping[str, float]


def nearest(front: Sequence[Point], share: float) -> Point:
    """The point of a curve whose cost is nearest, as a ratio."""
    return min(front, key=lambda point: abs(np.log(point.share / share)))


def knees(front: Sequence[Point]) -> list[Point]:
    """The points where a curve bends: the corners of its convex hull, over the logarithm of the share."""
    hull: list[Point] = []
    for point in sorted(front, key=lambda p: p.share):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        if not hull or point.share > hull[-1].share:
            hull.append(point)
    return [p for p, after in zip(hull, [*hull[1:], None], strict=True) if not after or after.share > _APART * p.share]


def _slope(low: Point, high: Point) -> float:
    return (high.value - low.value) / float(np.log(high.share / low.share))


def place_on_curve(budget: Budget, costs: PlanCosts, latencies: LayerLatencies | None) -> tuple[str, float]:
    """What a budget bounds, and to which part of the dense model's.

    Raises:
        InputError: it has several bounds.
    """
    kind, *others = budget.bounded
    if others:
        raise InputError(f"the budget {budget} has several bounds; a Pareto search goes along one: give one of them")
    dense = [*map(int, costs.dense[:2]), round(latencies.dense_ms * 1e6) if latencies else 1]
    bound = budget.bounds(*dense)[BOUNDS.index(kind)]
    assert bound is not None
    return kind, min(1.0, bound / dense[BOUNDS.index(kind)])


def reachable(
    importance: Importance, kind: str, limit: float, rules: Rules, latencies: LayerLatencies | None
) -> list[float]:
    """The parts of the dense model's cost that a Pareto search starts with, the least one that can be met last.

    The limit stands for one that is next to it: a bound is whole parameters, and what one more is worth is nothing.
    """
    found = []
    for share in (limit if isclose(known, limit, rel_tol=_SAME) else known for known in _SHARES):
        try:
            allocate(importance, Budget(**{kind: share}), **asdict(rules), latencies=latencies)
        except InputError:
            break
        found.append(share)
    return found if found and found[-1] <= limit else [*found, limit]


def along(start: Mapping[str, float], shares: Sequence[float], *, narrower: bool) -> list[dict[str, float]]:
    """The trials that a Pareto search starts with: one at every share, and one more of less width."""
    starts = [dict(start), {**start, WIDTH: _NARROWER}] if narrower else [dict(start)]
    return [{**known, "share": share} for known in starts for share in shares]
