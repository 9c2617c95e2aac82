"""Allocation: scores and a budget become a plan.

Greedy: as long as the budget is exceeded, the unit with the least score for the cost it saves goes. What a unit
saves depends on what is already gone (a head is cheaper when its q and k are small), so costs are recomputed
exactly after every removal.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sidt.allocation.alike import sizes_alike
from sidt.cost.budget import Budget
from sidt.cost.complexity import PlanCosts
from sidt.cost.latency import STEP, LayerLatencies, TimedPlanCosts
from sidt.errors import InputError
from sidt.importance.scores import Importance
from sidt.space.axes import Array
from sidt.space.families import INNER_KINDS, KINDS, Kind
from sidt.space.plan import DimensionPlan
from sidt.space.space import VANISHING, Dimension, DimensionSpace

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rules:
    """What allocation may do, apart from the budget.

    Attributes:
        kinds: the kinds of dimensions that may shrink; None: heads, qk, v, mlp, and the widths that are rotated
            (:func:`sidt.align`).
        freeze: dimensions that may not, as shell patterns: ``heads.0``, ``*.11``, ``hidden.*``.
        min_units: the least units of every dimension; with 0, heads and mlp may go to none and their sublayer with
            them, the others keep one.
        round_to: sizes of qk, v, mlp and width, and the channels outside a backbone, become multiples of this, or stay
            whole; heads are counted singly.
        uniform: whether all blocks (of a stage) get the same sizes, with q/k as large as v, and a width as wide as its
            heads together where the constructor makes it so. Then no sublayer goes.

    Raises:
        InputError: a kind is unknown, or a number is too small.
    """

    kinds: tuple[Kind, ...] | None = None
    freeze: tuple[str, ...] = ()
    min_units: int = 1
    round_to: int = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.kinds is not None and (not self.kinds or not set(self.kinds) <= set(KINDS)):
            raise InputError(f"kinds is {list(self.kinds)}; choose from {', '.join(KINDS)}")
        if self.uniform and not self.min_units:
            raise InputError("min_units is 0, but with uniform no sublayer can go; set it to 1")
        for name, least in {"min_units": 0, "round_to": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")

    def free(self, space: DimensionSpace) -> set[str]:
        """The dimensions that may shrink.

        Raises:
            InputError: a pattern of ``freeze`` matches no dimension.
        """
        for pattern in self.freeze:
            if not fnmatch.filter(space.dimensions, pattern):
                some = ", ".join(list(space.dimensions)[:6])
                raise InputError(f"freeze pattern {pattern!r} matches no dimension; they are {some}, ...")

        def is_free(dimension: Dimension) -> bool:
            frozen = any(fnmatch.fnmatchcase(dimension.name, p) for p in self.freeze)
            usual = dimension.ordered or dimension.kind in INNER_KINDS
            wanted = usual if self.kinds is None else dimension.kind in self.kinds
            return wanted and not dimension.fixed and not frozen

        return {d.name for d in space.dimensions.values() if is_free(d)}


def allocate(
    importance: Importance,
    budget: Budget,
    *,
    kinds: Iterable[Kind] | None = None,
    freeze: Iterable[str] = (),
    min_units: int = 1,
    round_to: int = 1,
    uniform: bool = False,
    multipliers: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
    latencies: LayerLatencies | None = None,
) -> DimensionPlan:
    """The plan that keeps the units with the highest score for their cost, within a budget.

    The plan is never above the budget, and uses at least 99 % of it wherever one step of some dimension is smaller
    than that (with two bounds: of the one that is reached first).

    Args:
        importance: a score for every unit.
        budget: what the plan may cost.
        kinds: see :class:`Rules`; as are the next four.
        freeze: patterns of dimensions that stay whole.
        min_units: the least units of a dimension; 0 lets heads and mlp go to none.
        round_to: what sizes are multiples of.
        uniform: the same sizes in every block.
        multipliers: factors on the scores of whole dimensions, by name.
        sizes: of dimensions whose size is given, by name; the rest of the budget is left to the others.
        latencies: of the layers, for a budget with a latency. Sizes are then multiples of 8 too: a kernel takes as
            long for those between.

    Raises:
        InputError: a pattern matches nothing, or the budget cannot be met; it names the smallest reachable value. Or
            it has a latency, and there are no latencies, or a width is to shrink that they do not cover.
    """
    rules = Rules(None if kinds is None else tuple(kinds), tuple(freeze), min_units, round_to, uniform)
    costs = PlanCosts(importance.space)
    if budget.latency is not None and latencies is not None:
        if unknown := sorted(rules.free(importance.space) - latencies.timed):
            raise InputError(
                f"the latency of layers is known for the whole {unknown[0]} alone; freeze it, or measure the layers of "
                f"an aligned model (sidt.align), where it can be rotated"
            )
        rules = stepped(rules)
        costs = TimedPlanCosts(importance.space, latencies)
    state = _Allocation(importance, costs, rules, multipliers or {}, sizes or {})
    if uniform:
        free = rules.free(importance.space) - set(sizes or {})
        found = sizes_alike(importance.space, costs, budget, state.lost_at, free, rules.round_to)
        state.size = np.array([found[d.name] for d in state.dims], dtype=np.int64)
        return state.plan()
    state.shrink(budget)
    return state.plan()


def stepped(rules: Rules) -> Rules:
    """The rules for a budget with a latency: a kernel takes as long for the sizes between two multiples of 8."""
    return replace(rules, round_to=math.lcm(rules.round_to, STEP))


def uniform(space: DimensionSpace, budget: Budget) -> DimensionPlan:
    """The plan that shrinks q/k, v and MLP sizes alike, by the same factor, as little as a budget asks for.

    No score is needed: it keeps the first units, so only its sizes mean something.

    Raises:
        InputError: the budget cannot be met in this way.
    """
    costs = PlanCosts(space)
    limits = budget.bounds(*(int(c) for c in costs.dense))
    dense = np.array([d.size for d in space.dimensions.values()], dtype=np.int64)
    alike = np.array([d.kind in ("qk", "v", "mlp") and not d.fixed for d in space.dimensions.values()])
    factors = np.linspace(0, 1, 4097)[:, None]
    sizes = np.where(alike, np.maximum(np.floor(factors * dense + 1e-9), np.minimum(dense, 1)), dense).astype(np.int64)
    used = costs.of(sizes)
    fits = np.all([used[:, k] <= limit for k, limit in enumerate(limits) if limit is not None], axis=0)
    if not fits.any():
        raise InputError(f"the budget {budget} cannot be met by q/k, v and MLP sizes that shrink alike; allocate() may")
    chosen = sizes[np.flatnonzero(fits)[-1]]
    keep: dict[str, Array] = {}
    for dimension, size in zip(space.dimensions.values(), chosen, strict=True):
        rows = () if dimension.per is None else (space.dimensions[dimension.per].size, 1)
        keep[dimension.name] = np.tile(np.arange(size), rows) if rows else np.arange(size)
    return DimensionPlan(space, keep)


def _next_size(dimension: Dimension, size: int, rules: Rules) -> int:
    """The next smaller size that the rules allow; ``size`` itself at the least one."""
    step = dimension.step(rules.round_to)
    smaller = (size - 1) // step * step
    return smaller if smaller >= max(rules.min_units, dimension.kind not in VANISHING) else size


class _Allocation:
    """The sizes of a plan while it shrinks."""

    def __init__(
        self,
        importance: Importance,
        costs: PlanCosts,
        rules: Rules,
        multipliers: Mapping[str, float],
        sizes: Mapping[str, int],
    ) -> None:
        self.space, self.costs, self.rules = importance.space, costs, rules
        self.dims = list(self.space.dimensions.values())
        self.column = {d.name: i for i, d in enumerate(self.dims)}
        free = rules.free(self.space) - set(sizes)
        self.free = np.array([d.name in free for d in self.dims])
        self.size = np.array([sizes.get(d.name, d.size) for d in self.dims], dtype=np.int64)
        self.scores = {
            d.name: _in_order(d, importance.scores[d.name]) * multipliers.get(d.name, 1.0) for d in self.dims
        }
        self.order = {n: np.argsort(-s, axis=-1, kind="stable") for n, s in self.scores.items()}  # best first
        # Score of the units beyond each size: lost[size] for plain dimensions, [parent, size] below a parent.
        self.lost = {n: _lost(s) for n, s in self.scores.items()}
        self.target = np.array([_next_size(d, d.size, rules) for d in self.dims], dtype=np.int64)
        self.target[~self.free] = self.size[~self.free]
        self.loss = np.array([self._loss(i) for i in range(len(self.dims))])
        self.saved = costs.savings(self.size, self.target, np.arange(len(self.dims)))
        self.children = {d.name: [self.column[c.name] for c in self.dims if c.per == d.name] for d in self.dims}
        coupled = costs.coupled() & self.free
        self.coupled = [np.flatnonzero(row) for row in coupled]

    def _loss(self, i: int) -> float:
        """Score that the next step of a dimension gives up."""
        dimension, lost = self.dims[i], self.lost[self.dims[i].name]
        step = lost[..., self.target[i]] - lost[..., self.size[i]]
        if dimension.per is None:
            return float(step)
        return float(step[self.order[dimension.per][: self.size[self.column[dimension.per]]]].sum())

    def lost_at(self, sizes: Array) -> float:
        """Score that is lost at some sizes of all dimensions."""
        total = 0.0
        for i, dimension in enumerate(self.dims):
            lost = self.lost[dimension.name][..., sizes[i]]
            if dimension.per is not None:
                lost = lost[self.order[dimension.per][: sizes[self.column[dimension.per]]]]
            total += float(lost.sum())
        return total

    def _set(self, i: int, size: int) -> None:
        """Change a size, and bring what depends on it up to date."""
        before = self.size[i] - self.target[i]
        self.size[i] = size
        for j in [i, *self.children[self.dims[i].name]]:
            if self.free[j]:
                self.target[j] = _next_size(self.dims[j], int(self.size[j]), self.rules)
                self.loss[j] = self._loss(j)
        # Costs are linear in a dimension alone: its own saving changes only with its step.
        stale = self.coupled[i]
        if self.size[i] - self.target[i] != before:
            stale = np.append(stale, i)
        if len(stale):
            self.saved[stale] = self.costs.savings(self.size, self.target, stale)

    def shrink(self, budget: Budget) -> None:
        """Remove units until the budget is met, then give back what still fits."""
        limits = budget.bounds(*(int(c) for c in self.costs.dense))
        bounded = [k for k, limit in enumerate(limits) if limit is not None]
        limit = np.array([limits[k] for k in bounded], dtype=np.int64)
        self._check_reachable(budget, bounded, limit)
        used = self.costs.of(self.size)[bounded]
        while (used > limit).any():
            saved = self.saved[:, bounded]
            relief = saved @ ((used > limit) / self.costs.dense[bounded])  # only bounds that are still exceeded count
            able = np.flatnonzero(relief > 0)
            # A step far below the budget is taken only where no smaller one is left.
            after = used - saved[able]
            fine = (after > limit).any(axis=1) | (after >= 0.99 * limit).any(axis=1)
            able = able[fine] if fine.any() else able
            i = int(able[np.argmin(self.loss[able] / relief[able])])
            used = used - saved[i]
            self._set(i, int(self.target[i]))
        self._give_back(bounded, limit)

    def _give_back(self, bounded: list[int], limit: Array) -> None:
        """Grow the dimension with the highest score for its cost, as long as one fits."""
        while True:
            best, best_value = None, -1.0
            now = self.costs.of(self.size)[bounded]
            for i in np.flatnonzero(self.free & (self.size < self._whole())):
                grown = self.size.copy()
                grown[i] = self._larger(int(i))
                cost = self.costs.of(grown)[bounded]
                if (cost > limit).any():
                    continue
                per = self.dims[i].per
                if per is not None and not self.size[self.column[per]]:
                    continue  # units of no heads
                lost = self.lost[self.dims[i].name]
                gain = lost[..., self.size[i]] - lost[..., grown[i]]
                total = float(gain if per is None else gain[self.order[per][: self.size[self.column[per]]]].sum())
                value = total / max(float(((cost - now) / limit).sum()), 1e-30)
                if value > best_value:
                    best, best_value = (int(i), int(grown[i])), value
            if best is None:
                return
            self._set(*best)

    def _whole(self) -> Array:
        return np.array([d.size for d in self.dims], dtype=np.int64)

    def _larger(self, i: int) -> int:
        dimension = self.dims[i]
        step = dimension.step(self.rules.round_to)
        return min(dimension.size, (int(self.size[i]) // step + 1) * step)

    def _check_reachable(self, budget: Budget, bounded: list[int], limit: Array) -> None:
        if not self.free.any() and (self.costs.of(self.size)[bounded] > limit).any():
            kinds, freeze = (
                ", ".join(names) for names in (self.rules.kinds or ("any",), self.rules.freeze or ("none",))
            )
            raise InputError(
                f"the budget {budget} cannot be met: no dimension may shrink, of the kinds {kinds} with {freeze} frozen"
            )
        least = self.size.copy()
        for i, dimension in enumerate(self.dims):
            while self.free[i] and (smaller := _next_size(dimension, int(least[i]), self.rules)) < least[i]:
                least[i] = smaller
        reachable = self.costs.of(least)
        for k, bound in zip(bounded, limit, strict=True):
            if reachable[k] > bound:
                name, part = ("params", "macs", "latency in ns")[k], reachable[k] / self.costs.dense[k]
                more = "" if budget.latency is not None else ", or search more kinds (width)"
                raise InputError(
                    f"the budget {budget} cannot be met: the smallest reachable {name} is {reachable[k]} ({part:.4f} "
                    f"of the dense model's {self.costs.dense[k]}); raise the budget{more}"
                )

    def plan(self) -> DimensionPlan:
        """The units with the highest scores, at the sizes that are left."""
        keep: dict[str, Array] = {}
        for i, dimension in enumerate(self.dims):
            order = self.order[dimension.name]
            if dimension.per is not None:
                order = order[keep[dimension.per]]
            keep[dimension.name] = np.sort(order[..., : self.size[i]], axis=-1)
        return DimensionPlan(self.space, keep)


def _in_order(dimension: Dimension, scores: Float) -> Float:
    """The scores; those of an ordered dimension so that no unit has less than those after it."""
    return np.maximum.accumulate(scores[::-1])[::-1] if dimension.ordered else scores


def _lost(scores: Float) -> Float:
    """Sum of the scores beyond the ``size`` best, for every size from 0 to all."""
    ascending = np.sort(scores, axis=-1)
    sums = np.concatenate([np.zeros((*scores.shape[:-1], 1)), np.cumsum(ascending, axis=-1)], axis=-1)
    return sums[..., ::-1]
