"""Complexity: parameters and multiply-adds of plans in closed form, and of any model by counting.

Every parameter has ``prod(axis sizes)`` entries and its layer ``positions * prod(axis sizes)`` multiply-adds;
attention has ``heads * qk`` and ``heads * v``, each with what the trace counted before and after the softmax
(:mod:`sidt.space.products`). All are sums of products of dimension sizes, so a space has one polynomial for parameters
and one for multiply-adds, whose terms also tell where the cost is.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sidt.space.axes import Array, Axis, Present, layout, names, term_size
from sidt.space.space import DimensionSpace
from sidt.space.trace import InputSize, trace

Group = Literal["module", "block", "kind"]
NOT_COUNTED = "elementwise operations, norms, softmax and pooling"


@dataclass(frozen=True)
class CostTerm:
    """A product in the two polynomials: ``params * prod(sizes)``, ``macs * prod(sizes)``, and whose it is.

    It is there while each dimension of ``present`` has units.
    """

    module: str
    block: str
    dimensions: tuple[str, ...]
    params: int
    macs: int
    present: tuple[str, ...] = ()


def cost_terms(space: DimensionSpace) -> list[CostTerm]:
    """The cost of a space, of the places that it counts, as a sum of products of dimension sizes."""
    terms = []
    for name, place in space.places.items():
        if not name.startswith(space.counted):
            continue
        used = space.trace.positions.get(name, ())
        count = 0 if place.is_buffer else 1
        if count or used:
            module = name.rpartition(".")[0] or name
            for positions, coefficient, dimensions, present in _expand(place.axes, used, space.sizes):
                macs, shared = positions * coefficient, _shared_by(dimensions, space.per)
                if macs and shared:  # a layer on the units of a head is one for all heads, and is applied to each
                    each = macs // max(term_size(shared, space.sizes), 1)
                    terms.append(CostTerm(module, place.block, (*dimensions, *shared), 0, each, present))
                    macs = 0
                terms.append(CostTerm(module, place.block, dimensions, count * coefficient, macs, present))
            if not used and name.endswith(".weight") and not any(map(names, place.axes)):
                # Never searched, and made anew at each call, as where it is standardised: the trace knows its module.
                terms.append(CostTerm(module, place.block, (), 0, space.trace.module_macs.get(module, 0)))
    for heads, owner in space.attention.items():
        block = next(p.block for n, p in space.places.items() if n.startswith(owner + "."))
        inner = {d.kind: (heads, d.name) for d in space.dimensions.values() if d.per == heads}
        for follows, macs in space.trace.products_in(owner).items():
            dimensions = inner[follows] if follows != "heads" else (heads,)
            units = max(term_size(dimensions, space.sizes), 1)
            terms.append(CostTerm(owner, block, dimensions, 0, macs // units))
    rest = space.trace.module_macs[space.counted.rstrip(".")] - sum(_dense(t, space.sizes)[1] for t in terms)
    if rest:  # matrix products that no axis explains: counted, but they do not follow the plan
        terms.append(CostTerm("(other)", "(other)", (), 0, rest))
    return terms


def _shared_by(dimensions: Sequence[str], per: Mapping[str, str]) -> tuple[str, ...]:
    """The heads of units that stand without them."""
    return tuple(dict.fromkeys(per[name] for name in dimensions if name in per and per[name] not in dimensions))


def _expand(
    axes: Sequence[Axis], used: Sequence[tuple[int, int, int]], sizes: Mapping[str, int]
) -> Iterable[tuple[int, int, tuple[str, ...], tuple[str, ...]]]:
    """The products that a tensor's size is the sum of: positions of its rows, coefficient, dimensions, present ones.

    Rows are the first axis. A term of it that is used in parts has no number of positions of its own; what they
    do not share goes to the rest that does not follow the plan.
    """
    for rows, at in layout(axes[0], sizes) if axes else [((), np.zeros(1))]:  # a single number has no axis
        shared = sum(n * int(((first <= at) & (at < last)).sum()) for first, last, n in used)
        positions = shared // max(at.size, 1)
        for choice in product(*axes[1:]):
            symbols = [s for term in (rows, *choice) for s in term]
            coefficient = int(np.prod([s for s in symbols if isinstance(s, int)], dtype=np.int64))
            present = tuple(s.of for s in symbols if isinstance(s, Present))
            yield positions, coefficient, tuple(s for s in symbols if isinstance(s, str)), present


def _dense(term: CostTerm, sizes: Mapping[str, int]) -> tuple[int, int]:
    size = int(all(sizes[name] for name in term.present))
    for name in term.dimensions:
        size *= sizes[name]
    return term.params * size, term.macs * size


class PlanCosts:
    """The two cost polynomials of a space, evaluated for many plans at once.

    Attributes:
        names: the dimensions, in the order of the columns that :meth:`of` takes.
        dense: parameters and multiply-adds of the dense model, shape [2].
    """

    def __init__(self, space: DimensionSpace) -> None:
        """Collect equal products of a space's terms."""
        self.names = tuple(space.dimensions)
        column = {name: i for i, name in enumerate(self.names)}
        count = len(column)
        collected: dict[tuple[int, ...], list[int]] = defaultdict(lambda: [0, 0])
        for term in cost_terms(space):
            factors = [column[n] for n in term.dimensions] + [count + column[n] for n in term.present]
            entry = collected[tuple(sorted(factors))]
            entry[0] += term.params
            entry[1] += term.macs
        # After the sizes come columns of their presence (1, or 0 for none); products are padded to one degree with a
        # last column of ones.
        degree = max(map(len, collected))
        padded = [key + (2 * count,) * (degree - len(key)) for key in collected]
        self._factors = np.array(padded, dtype=np.int64)  # [products, degree]
        self._coefficients = np.array(list(collected.values()), dtype=np.int64)  # [products, 2]
        self.dense = self.of(np.array([space.sizes[n] for n in self.names]))

    def of(self, sizes: Array) -> Array:
        """Parameters and multiply-adds.

        Args:
            sizes: dimension sizes in the order of ``names``, shape [..., dimensions].

        Returns:
            Shape [..., 2], exact.
        """
        ones = np.ones_like(sizes[..., :1])
        columns = np.concatenate([sizes, np.minimum(sizes, 1), ones], axis=-1, dtype=np.int64)
        products = columns[..., self._factors[:, 0]]
        for position in range(1, self._factors.shape[1]):
            products *= columns[..., self._factors[:, position]]
        costs: Array = products @ self._coefficients
        return costs

    def coupled(self) -> npt.NDArray[np.bool_]:
        """Which dimensions share a product: one's size sets the other's cost. Shape [dimensions] * 2.

        A dimension is coupled with itself if its cost is not linear in its size.
        """
        count = len(self.names)
        coupled = np.zeros((count + 1, count + 1), dtype=bool)
        presence = (self._factors >= count) & (self._factors < 2 * count)
        columns = np.where(presence, self._factors - count, np.minimum(self._factors, count))
        for first in range(columns.shape[1]):
            for second in range(columns.shape[1]):
                if first != second:
                    coupled[columns[:, first], columns[:, second]] = True
        coupled[columns[presence], columns[presence]] = True
        return coupled[:count, :count]

    def savings(self, sizes: Array, smaller: Array, which: Array) -> Array:
        """What each of some dimensions saves by shrinking alone to its smaller size, shape [which, 2]."""
        shrunk = np.repeat(sizes[None], len(which) + 1, axis=0)
        shrunk[np.arange(len(which)), which] = smaller[which]
        costs = self.of(shrunk)  # the last row is the sizes as they are
        saved: Array = costs[-1] - costs[:-1]
        return saved


@dataclass(frozen=True)
class Row:
    """Parameters and multiply-adds of one part of a model."""

    name: str
    params: int
    macs: int


@dataclass(frozen=True)
class ComplexityReport:
    """Where the parameters and multiply-adds of a model are, for one image.

    Attributes:
        model: its class name.
        input_size: channels, height, width.
        rows: the parts, in the model's order.
        not_counted: what the multiply-adds leave out.
        latency_ms: median milliseconds for one image, if it was measured.
    """

    model: str
    input_size: InputSize
    rows: tuple[Row, ...]
    not_counted: str = NOT_COUNTED
    latency_ms: float | None = None

    @property
    def params(self) -> int:
        """All parameters."""
        return sum(row.params for row in self.rows)

    @property
    def macs(self) -> int:
        """All multiply-adds for one image, attention included; a multiply-add counts as 1."""
        return sum(row.macs for row in self.rows)


_PRECEDENCE = ("channels", "mlp", "v", "qk", "heads", "width")


def report(space: DimensionSpace, sizes: Mapping[str, int] | None = None, by: Group = "module") -> ComplexityReport:
    """The complexity of a plan in closed form, without building its model.

    Args:
        space: the space of the dense model.
        sizes: the plan's sizes; default: the dense ones.
        by: one row for each module, block, or kind of dimension (the innermost that a product has).
    """
    sizes = sizes or space.sizes
    totals: dict[str, list[int]] = {}
    for term in cost_terms(space):
        kinds = {space.dimensions[n].kind for n in term.dimensions}
        kind = next((k for k in _PRECEDENCE if k in kinds), "(none)")
        key = {"module": term.module, "block": term.block, "kind": kind}[by]
        params, macs = _dense(term, sizes)
        entry = totals.setdefault(key, [0, 0])
        entry[0] += params
        entry[1] += macs
    rows = tuple(Row(name, params, macs) for name, (params, macs) in totals.items())
    return ComplexityReport(space.model, space.trace.input_size, rows)


def shares(space: DimensionSpace) -> dict[str, float]:
    """For each dimension, the share of all parameters that would go with it."""
    terms = [(term, _dense(term, space.sizes)[0]) for term in cost_terms(space)]
    total = sum(params for _, params in terms)
    return {name: sum(p for term, p in terms if name in term.dimensions) / total for name in space.dimensions}


def measure(model: nn.Module, input_size: InputSize | None = None, *, latency: bool = False) -> ComplexityReport:
    """Count the parameters and multiply-adds of any model, with or without a space.

    Multiply-adds are those of PyTorch's own flop counter, halved, with attention as two matrix products.

    Args:
        model: any module that takes one image batch.
        input_size: channels, height, width; default: what the model was built for.
        latency: also time a forward of one image on the model's device.

    Raises:
        InputError: the input size is unknown, or the model does not take it.
    """
    seen = trace(model, input_size)
    own = {name: sum(p.numel() for p in module.parameters(recurse=False)) for name, module in model.named_modules()}
    rows = []
    for name in own:
        children = [n for n in own if n and n != name and n.rpartition(".")[0] == name]
        macs = seen.module_macs.get(name, 0) - sum(seen.module_macs.get(c, 0) for c in children)
        if own[name] or macs:
            rows.append(Row(name or "(root)", own[name], macs))
    milliseconds = time_forward(model, seen.input_size) if latency else None
    return ComplexityReport(type(model).__name__, seen.input_size, tuple(rows), latency_ms=milliseconds)


def time_forward(model: nn.Module, input_size: InputSize, *, batch: int = 1, seconds: float = 1.0) -> float:
    """Median milliseconds of a forward pass of ``batch`` images on the model's device (torch's timer)."""
    parameter = next(model.parameters())
    images = torch.randn(batch, *input_size, device=parameter.device, dtype=parameter.dtype)
    return time_call(model, lambda model: model(images), seconds=seconds)


def time_call(model: nn.Module, call: Callable[[nn.Module], Any], *, seconds: float = 1.0) -> float:
    """Median milliseconds of a call of a model in eval mode; its training mode comes back."""
    from torch.utils.benchmark import Timer  # here: it looks for CUDA when imported, and says so

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            call(model)  # warm-up: the timer's own first run is counted
            timer = Timer(
                "call(model)",
                globals={"model": model, "call": call},
                num_threads=torch.get_num_threads(),
            )
            return float(timer.blocked_autorange(min_run_time=seconds).median * 1e3)
    finally:
        model.train(training)
