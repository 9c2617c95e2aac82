"""Steps: a small model reached by several slices, each of a model that was aligned and scored anew.

What a basis and scores say holds near the model that they are of. Far below it, at a tenth of the parameters, they are
better taken again on the way: the bounds shrink by the same factor in every step, and the plans compose into one. The
last step is an allocation, or a search, like any other; :func:`before_last` makes the model that it starts from.
"""

from collections.abc import Callable
from dataclasses import asdict

from torch import nn

from sidt.allocation.greedy import Rules, allocate
from sidt.cost.budget import Budget
from sidt.cost.complexity import PlanCosts
from sidt.cost.latency import LayerLatencies
from sidt.importance.scores import Importance
from sidt.space.plan import DimensionPlan

Slicer = Callable[[DimensionPlan], nn.Module]
Prepare = Callable[[nn.Module], tuple[nn.Module, Importance, Slicer]]  # model -> aligned, its scores, its slicer
Timed = Callable[[nn.Module, Importance, Budget], LayerLatencies | None]  # aligned, its scores, budget

MOST = 32
_FEW, _SHARE = 4, 0.12  # benchmarks/results/width.md: one step is as good at 20 %, and 2.6 points worse at 10 %


def steps_for(budget: Budget) -> int:
    """How many steps serve a budget: several where little stays; one for bounds that are no fractions."""
    return _FEW if min(budget.fractions, default=1.0) <= _SHARE else 1


def before_last(
    model: nn.Module,
    budget: Budget,
    steps: int,
    prepare: Prepare,
    *,
    rules: Rules | None = None,
    timed: Timed = lambda *_: None,
) -> tuple[nn.Module, Budget]:
    """Slice a model in all steps but the last.

    Args:
        model: the dense model.
        budget: of the last step.
        steps: how many; with 1, there is nothing to do.
        prepare: aligns and scores a model, and says how plans are cut out of it.
        rules: what allocation may do, in every step.
        timed: the latencies of the layers of a step's model, for a budget with a latency.

    Returns:
        The model that the last step starts from, and its budget: absolute, since fractions are of the dense model.

    Raises:
        InputError: the budget of a step cannot be met.
    """
    dense: tuple[int, ...] = ()
    for step in range(1, steps):
        base, importance, slicer = prepare(model)
        now = budget if not dense else budget.on_the_way(dense, 1.0)
        latencies = timed(base, importance, now)
        if not dense:
            dense = tuple(int(c) for c in PlanCosts(importance.space).dense)
            dense += () if latencies is None else (round(latencies.dense_ms * 1e6),)
        limits = budget.on_the_way(dense, step / steps)
        model = slicer(allocate(importance, limits, **asdict(rules or Rules()), latencies=latencies))
    return model, budget.on_the_way(dense, 1.0) if dense else budget
