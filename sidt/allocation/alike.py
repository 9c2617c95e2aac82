"""Uniform allocation: every block of a stage gets the same sizes, so that constructors take them.

Of each stage three numbers are chosen: heads, units in each of them (of q, k and v), and hidden units. A width that the
constructor makes of the heads and their size (``tied`` in the search space) follows from the first two; other widths
keep the proportions that they have. Greedy over these numbers, as :mod:`sidt.allocation.greedy` is over dimensions.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from sidt.cost.budget import Budget
from sidt.cost.complexity import PlanCosts
from sidt.errors import InputError
from sidt.space.axes import Array
from sidt.space.space import DimensionSpace

_PARTS = 64  # the step of a number is at most its 64th part; what is left over of the budget is given back by ones


@dataclass
class _Number:
    """One number of the model.

    Attributes:
        name: for messages.
        columns: the dimensions that have it.
        factors: what it is multiplied with in each.
        step: what it is a multiple of.
        value: what it is.
        whole: in the dense model.
        free: whether it may shrink.
    """

    name: str
    columns: list[int]
    factors: list[int]
    step: int
    value: int
    whole: int
    free: bool

    def smaller(self) -> int:
        """The next value down; the same if there is none."""
        step = max(self.value // _PARTS, 1)
        found = (self.value - step) // self.step * self.step
        return found if found >= 1 else self.value

    def larger(self) -> int:
        """The next value up."""
        return min((self.value // self.step + 1) * self.step, self.whole)


def sizes_alike(
    space: DimensionSpace,
    costs: PlanCosts,
    budget: Budget,
    lost: Callable[[Array], float],
    free: Collection[str],
    round_to: int,
) -> dict[str, int]:
    """The sizes of all dimensions, the same in all blocks of a stage, within a budget.

    Args:
        space: of the model.
        costs: of its plans.
        budget: what it may cost.
        lost: the score that is lost at some sizes, which come in the order of the space's dimensions.
        free: the dimensions that may shrink; a number shrinks if all that have it may.
        round_to: what sizes are multiples of, but for heads.

    Raises:
        InputError: the budget cannot be met in this way.
    """
    numbers, tied = _numbers(space, free, round_to)
    limits = budget.bounds(*(int(c) for c in costs.dense))
    bounded = [k for k, limit in enumerate(limits) if limit is not None]
    limit = np.array([limits[k] for k in bounded], dtype=np.int64)

    def at(changed: _Number | None = None, value: int = 0) -> Array:
        sizes = np.zeros(len(space.dimensions), dtype=np.int64)
        for number in numbers:
            now = value if number is changed else number.value
            sizes[number.columns] = now * np.array(number.factors)
        for width, heads, size in tied:
            sizes[width] = sizes[heads] * sizes[size]
        return sizes

    def moved(up: bool) -> list[tuple[_Number, int, Array, float]]:
        steps = [(n, n.larger() if up else n.smaller()) for n in numbers if n.free]
        found = [(n, value, at(n, value)) for n, value in steps if value != n.value]
        return [(n, value, costs.of(sizes)[bounded], lost(sizes)) for n, value, sizes in found]

    while ((used := costs.of(at())[bounded]) > limit).any():
        now = lost(at())
        best: tuple[float, _Number | None, int] = (np.inf, None, 0)
        able = [step for step in moved(up=False) if ((used - step[2]) @ ((used > limit) / costs.dense[bounded])) > 0]
        near = [s for s in able if (s[2] > limit).any() or (s[2] >= 0.95 * limit).any()]  # not far below if need be
        for number, value, cost, then in near or able:
            price = (then - now) / float((used - cost) @ ((used > limit) / costs.dense[bounded]))
            if price < best[0]:
                best = (price, number, value)
        if best[1] is None:
            raise InputError(
                f"the budget {budget} cannot be met with the same sizes in every block: the smallest that is reached "
                f"is {used[0] / costs.dense[bounded][0]:.4f}; raise it, align the model so that its width may shrink, "
                f"or leave out uniform"
            )
        best[1].value = best[2]
    while fitting := [step for step in moved(up=True) if (step[2] <= limit).all()]:
        now, used = lost(at()), costs.of(at())[bounded]
        gains = [(now - then) / max(float(((cost - used) / limit).sum()), 1e-30) for _, _, cost, then in fitting]
        number, value, _, _ = fitting[int(np.argmax(gains))]
        number.value = value
    return dict(zip(space.dimensions, map(int, at()), strict=True))


def _numbers(
    space: DimensionSpace, free: Collection[str], round_to: int
) -> tuple[list[_Number], list[tuple[int, int, int]]]:
    """The numbers of a model; and of each width that follows from them its column, that of the heads, of their size."""
    column = {name: i for i, name in enumerate(space.dimensions)}
    dimensions = list(space.dimensions.values())
    stages = {d.index for d in dimensions if d.kind == "width"}
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, dimension in enumerate(dimensions):
        if dimension.kind != "width":
            group = "head size" if dimension.kind in ("qk", "v") else dimension.kind
            groups.setdefault((group, _stage(dimension.index, stages)), []).append(i)
    tied, numbers, frozen = [], [], set()
    for name in space.tied:
        stage = dimensions[column[name]].index
        if ("heads", stage) not in groups:
            continue
        heads, size = groups["heads", stage][0], groups["head size", stage][0]
        if all(dimensions[i].size == dimensions[heads].size for i in groups["heads", stage]) and (
            dimensions[heads].size * dimensions[size].size == space.sizes[name]
        ):
            tied.append((column[name], heads, size))
            if name not in free:
                frozen |= {("heads", stage), ("head size", stage)}
    for (kind, stage), members in groups.items():
        whole = min(dimensions[i].size for i in members)
        may = all(dimensions[i].name in free for i in members) and (kind, stage) not in frozen
        step = dimensions[members[0]].step(round_to)
        label = f"{kind}.{'.'.join(map(str, stage))}".rstrip(".")
        # Of q/k whose units are pairs of rows, half as many are as large as v.
        even = kind == "head size" and all(dimensions[i].size % whole == 0 for i in members)
        factors = [dimensions[i].size // whole if even else 1 for i in members]
        numbers.append(_Number(label, members, factors, step, whole, whole, may))
    others = [i for i, d in enumerate(dimensions) if d.kind == "width" and i not in {width for width, _, _ in tied}]
    if others:
        least = min(dimensions[i].size for i in others)
        whole_ratios = all(dimensions[i].size % least == 0 for i in others)
        may = whole_ratios and all(dimensions[i].name in free for i in others)
        unit = least if whole_ratios else 1
        factors = [dimensions[i].size // unit for i in others]
        numbers.append(_Number("width", others, factors, round_to, unit, unit, may))
    return numbers, tied


def _stage(index: tuple[int, ...], stages: Collection[tuple[int, ...]]) -> tuple[int, ...]:
    """The indices of a block that it shares with the width of its stage: a block may hold several sublayers alike."""
    return next((index[:n] for n in range(len(index) - 1, 0, -1) if index[:n] in stages), ())
