"""Criteria of importance.

Each criterion gives every entry of every weight a contribution; the score of a unit sums them over all places where
the unit lives (or squares that sum). So all criteria share one reduction, for any backbone and any loss.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sidt.errors import InputError
from sidt.importance.directions import along, is_centred
from sidt.importance.scores import Importance, unit_sums
from sidt.space.axes import names
from sidt.space.outputs import heads_of
from sidt.space.space import DimensionSpace, space_for
from sidt.surgery.moments import argument, rows_of
from sidt.surgery.rotation import rotatable
from sidt.surgery.slicing import explicit
from sidt.training.batches import rechunk
from sidt.training.evaluation import evaluating

Loss = Callable[[nn.Module, Any], Tensor]


def _importance(space: DimensionSpace, sums: Mapping[str, Tensor]) -> Importance:
    return Importance(space, {name: s.numpy() for name, s in sums.items()})


def random(model: nn.Module, *, seed: int = 0, space: DimensionSpace | None = None) -> Importance:
    """Uniform scores: the baseline that any criterion has to beat."""
    space = space or space_for(model)
    generator = np.random.default_rng(seed)
    empty = unit_sums(space, ())
    return Importance(space, {name: generator.random(tuple(s.shape)) for name, s in empty.items()})


def magnitude(model: nn.Module, *, p: Literal[1, 2] = 1, space: DimensionSpace | None = None) -> Importance:
    """The L1 (``p=1``) or L2 (``p=2``) norm of all weights of a unit.

    Raises:
        InputError: ``p`` is neither.
    """
    if p not in (1, 2):
        raise InputError(f"magnitude takes p=1 or p=2, got {p!r}")
    space = space or space_for(model)
    weights = ((n, w.detach().abs().double() ** p) for n, w in _weights(model, space).items())
    return _importance(space, {n: s ** (1 / p) for n, s in unit_sums(space, weights).items()})


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a classifier on (images, targets)."""
    images, targets = batch
    device = next(model.parameters()).device
    logits = torch.stack(heads_of(model(images.to(device)))).mean(0)
    return F.cross_entropy(logits, targets.to(device))


def taylor(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss = cross_entropy,
    *,
    level: Literal["unit", "parameter"] = "unit",
    group: int = 32,
    space: DimensionSpace | None = None,
) -> Importance:
    """First-order change of the loss when a unit is removed, squared and averaged.

    ``unit``: ``(sum w * grad)^2`` over all weights of a unit (Molchanov et al. 2019, on gates); ``parameter``:
    ``sum (w * grad)^2``. The square is taken for each group of samples, whatever the batches are, so the scores do
    not depend on the batch size of the loader.

    Args:
        model: the dense model; it is used in eval mode and left as it was.
        batches: (images, targets), or anything that ``loss`` takes; the latter are groups as they come.
        loss: mean loss of a batch.
        level: what is squared.
        group: samples whose gradient is averaged before squaring.
        space: the model's space, if it is at hand.

    Raises:
        InputError: there is no batch, or the loss is not finite.
    """
    space = space or space_for(model)

    if level not in ("unit", "parameter"):
        raise InputError(f"taylor takes level='unit' or 'parameter', got {level!r}")
    return _average(model, space, batches, loss, group, square_sums=level == "unit")


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss = cross_entropy,
    *,
    space: DimensionSpace | None = None,
) -> Importance:
    """``sum w^2 F`` with the diagonal empirical Fisher information ``F = mean over samples of grad^2``.

    The second-order change of the loss when the weights of a unit go to zero, up to a factor (Theis et al. 2018).
    The arguments are those of :func:`taylor`; every sample has its own backward pass.
    """
    return _average(model, space or space_for(model), batches, loss, 1, square_sums=False)


def activation(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, space: DimensionSpace | None = None
) -> Importance:
    """Energy that a unit passes on: mean square of its activation times the squared weights that read it.

    Dimensions that no layer reads (q and k meet in a product) have the mean square of what is written to them.

    Args:
        model: the dense model; it is used in eval mode and left as it was.
        batches: (images, targets); the targets are not used.
        space: the model's space, if it is at hand.

    Raises:
        InputError: there is no batch.
    """
    space = space or space_for(model)
    twin = explicit(model, space)
    mode = _Energies(_weights(twin, space))
    device = next(model.parameters()).device
    seen = 0
    with torch.no_grad(), mode:
        for images, _ in batches:
            twin(images.to(device))
            seen += len(images)
    if not seen:
        raise InputError("activation importance got no batch; give at least one image")
    weights = mode.weights
    read = {n: weights[n].square() * _spread(energy, weights[n].ndim) for n, energy in mode.read.items()}
    written = {n: _spread(energy, weights[n].ndim) for n, energy in mode.written.items()}
    from_readers, from_writers = (unit_sums(space, tensors.items(), dim) for tensors, dim in ((read, 1), (written, 0)))
    scores = {n: s if s.any() else from_writers[n] for n, s in from_readers.items()}
    return _importance(space, {n: s / seen for n, s in scores.items()})


class _Energies(TorchFunctionMode):
    """Sums the squares of what every row of every weight reads, [rows, in], and writes, [rows]."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.names = {id(weight): name for name, weight in weights.items()}
        self.read: dict[str, Tensor] = {}
        self.written: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (F.linear, F.conv2d):
            read, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
            if (rows := rows_of(weight, self.names)) is not None:
                (name, start), end, convolution = rows, rows[1] + len(weight), func is F.conv2d
                whole = self.weights[name]
                self._add(self.written, name, whole.shape[:1], start, end, _energy(out, convolution))
                if weight.shape[1] == read.shape[1 if convolution else -1]:  # not depthwise
                    self._add(self.read, name, whole.shape[:2], start, end, _energy(read, convolution))
        return out

    @staticmethod
    def _add(totals: dict[str, Tensor], name: str, shape: torch.Size, start: int, end: int, energy: Tensor) -> None:
        if name not in totals:
            totals[name] = energy.new_zeros(shape)
        totals[name][start:end] += energy


def _energy(values: Tensor, convolution: bool) -> Tensor:
    """The sum of squares of every channel."""
    values = values.movedim(1, -1) if convolution else values
    return values.double().square().flatten(0, -2).sum(0)


def _spread(energy: Tensor, ndim: int) -> Tensor:
    """With axes of one entry at the end, to have ``ndim``."""
    return energy.view(*energy.shape, *[1] * (ndim - energy.ndim))


def _weights(model: nn.Module, space: DimensionSpace) -> dict[str, nn.Parameter]:
    """The parameters that a dimension lives in."""
    own = dict(model.named_parameters())
    lived_in = {name for name, place in space.places.items() if any(names(axis) for axis in place.axes)}
    return {name: own[name] for name in own if name in lived_in}


def _average(
    model: nn.Module,
    space: DimensionSpace,
    batches: Iterable[Any],
    loss: Loss,
    group: int,
    *,
    square_sums: bool,
) -> Importance:
    """Squares of weight times gradient, or of its sums over a unit, averaged over groups weighted by their sizes."""
    weights, samples = _weights(model, space), 0
    totals = unit_sums(space, ())

    def squared(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, Tensor]:
        products = ((name, own.detach() * grad) for name, own, grad in pairs)
        if square_sums:
            return {name: sums.square() for name, sums in unit_sums(space, products).items()}
        return unit_sums(space, ((name, product.square()) for name, product in products))

    # The units of a width behind a LayerNorm are scored as the directions that they stand for.
    streams = rotatable(space)  # without a width whose blocks have all lost their units
    centred = {w: streams[w].places for w in space.rotated() if w in streams and is_centred(model, space, w)}
    frozen = [w for w in weights.values() if not w.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with evaluating(model):
            for count, batch in _groups(batches, group):
                value = loss(model, batch)
                if not torch.isfinite(value):
                    raise InputError(
                        f"the loss is {value.item()} after {samples} samples; check the model and the data"
                    )
                grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                seen = {n: g for n, g in zip(weights, grads, strict=True) if g is not None}
                scores = squared((n, weights[n], g) for n, g in seen.items())
                for width, places in centred.items():
                    turned = (
                        (n, along(weights[n].detach(), n, space, width), along(seen[n], n, space, width))
                        for n in places
                        if n in seen
                    )
                    scores[width] = squared(turned)[width]
                for name, score in scores.items():
                    totals[name] += count * score
                samples += count
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    if not samples:
        raise InputError("importance got no batch; give at least one")
    return _importance(space, {n: s / samples for n, s in totals.items()})


def _groups(batches: Iterable[Any], group: int) -> Iterator[tuple[int, Any]]:
    """(number of samples, batch): pairs of tensors regrouped to ``group`` samples, anything else as it comes."""
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        return
    stream = chain([first], stream)
    if isinstance(first, tuple | list) and len(first) == 2 and all(isinstance(part, Tensor) for part in first):
        yield from ((len(targets), (images, targets)) for images, targets in rechunk(stream, group))
    else:
        yield from ((1, batch) for batch in stream)
