"""The knobs of a search: what no ranking knows, as factors on scores and on the width.

Scores rank the units inside a dimension; how far scores of different kinds and depths can be compared is searched: one
multiplier for each kind and for each quarter of the depth. How much of a rotated width to keep against everything else
is searched too, as a factor on what the ranking keeps.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sidt.allocation.greedy import Rules, allocate, stepped
from sidt.cost.budget import Budget
from sidt.cost.latency import LayerLatencies
from sidt.importance.scores import Importance
from sidt.space.families import KINDS
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace

WIDTH = "width"
_DEPTHS = 4
_WIDTH_RANGE = (-1.0, 0.5)  # log2 of the factor on the rotated widths of the plain ranking
_LOG2_RANGE = 2.0  # multipliers between 1/4 and 4: beyond, plans were only worse than the plain ranking


def knobs_of(space: DimensionSpace, rules: Rules) -> dict[str, tuple[float, float]]:
    """What is searched, with its range. Multipliers are relative, so the first kind and the first depth have none."""
    free = [d for d in space.dimensions.values() if d.name in rules.free(space)]
    kinds = [k for k in KINDS[1:] + KINDS[:1] if any(d.kind == k and not d.ordered for d in free)]
    names = [f"kind.{kind}" for kind in kinds[1:]]
    if rules.uniform:  # a width follows from the heads, and all depths have one size
        return dict.fromkeys(names, (-_LOG2_RANGE, _LOG2_RANGE))
    names += [f"depth.{depth}" for depth in range(1, min(_DEPTHS, len(space.blocks())))]
    width = {WIDTH: _WIDTH_RANGE} if any(d.ordered for d in free) else {}
    return width | dict.fromkeys(names, (-_LOG2_RANGE, _LOG2_RANGE))


def plan_at(
    importance: Importance,
    budget: Budget,
    knobs: Mapping[str, float],
    *,
    rules: Rules | None = None,
    latencies: LayerLatencies | None = None,
) -> DimensionPlan:
    """The plan of a trial's knobs at a budget, be it another one than the trial's.

    Args:
        importance: the scores.
        budget: what the plan may cost.
        knobs: log2 of the factors, by knob (``SearchResult.multipliers``, ``Point.knobs``).
        rules: what allocation may do.
        latencies: of the layers, for a budget with a latency.

    Raises:
        InputError: the budget cannot be met.
    """
    rules, space = rules or Rules(), importance.space
    options: dict[str, Any] = {**asdict(rules), "latencies": latencies}
    factor, sizes = knobs.get(WIDTH, 0.0), {}
    if factor and not rules.uniform:
        plain, near = allocate(importance, budget, **options).sizes, stepped(rules) if latencies else rules
        free = [name for name in space.rotated() if name in rules.free(space)]
        sizes = {n: _near(plain[n] * 2.0**factor, space.sizes[n], near) for n in free}
    options["multipliers"] = _multipliers(space, knobs)
    plan = allocate(importance, budget, **options, sizes=sizes)
    others = rules.free(space) - set(sizes)
    if sizes and all(plan.sizes[name] == space.sizes[name] for name in others):
        # With so little width, all the rest does not use the budget: the width is then what the ranking makes it.
        plan = allocate(importance, budget, **options)
    return plan


def _near(size: float, whole: int, rules: Rules) -> int:
    """The size of a width that the rules allow nearest to one, of at most the whole."""
    step = rules.round_to
    return min(whole, max(round(size / step) * step, step, 2))


def _multipliers(space: DimensionSpace, params: Mapping[str, float]) -> dict[str, float]:
    blocks = space.blocks()
    depths = min(_DEPTHS, len(blocks))
    found = {}
    for dimension in space.dimensions.values():
        exponent = params.get(f"kind.{dimension.kind}", 0.0)
        if dimension.index in blocks:
            exponent += params.get(f"depth.{blocks.index(dimension.index) * depths // len(blocks)}", 0.0)
        found[dimension.name] = 2.0**exponent
    return found
