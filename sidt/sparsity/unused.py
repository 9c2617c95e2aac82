"""Unused Path Removal: units that no output depends on leave through the plan, and the outputs stay what they are.

Adapted from the memristor framework's (structured pruning and quantization by ADMM, Network Purification, Unused Path
Removal), on the units of a dimension space. Two steps, both exact up to rounding:

1. **Fold.** A unit that its layer writes with zero weights alone is a constant to whoever reads it: an activation of
   the bias, or the bias itself behind attention, whose rows sum to one. ``W[:, u] * constant`` moves into the reader's
   bias, and the column becomes zero.
2. **Plan.** What nobody reads goes: hidden units and v units whose columns are zero, heads none of whose v units is
   read, q/k units whose k row is zero (softmax ignores a shift) or whose q row and bias are zero.

The table of axes says who writes and who reads a unit. What a unit that is written with zero weights gives, through
whatever stands in between, is seen in one forward pass in float64.

Left as they are, since no zero shows that they are unused: units that statistics are taken over (by norms of q
and k, inside attention or an MLP); q/k of attentions whose logits are no plain products (cosine,
rotary); products of two units of which one is constant (SwiGLU, gated attention), unless nobody reads them; constants
other than 0 behind a zero-padded convolution, which sees its border (PVT's MLP), and those whose reader has no bias;
the width, since every norm counts it.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sidt.space.axes import Array, names, views
from sidt.space.plan import DimensionPlan
from sidt.space.space import Dimension, DimensionSpace, space_for
from sidt.surgery.moments import Forward, run_images
from sidt.surgery.slicing import explicit, is_bilinear, slice_model

Model = TypeVar("Model", bound=nn.Module)
Units = npt.NDArray[np.bool_]  # one for each unit, shape [size] or [parents, size]

_STILL = 1e-10  # a constant's spread in float64, of which attention's sums leave about 1e-15


def remove_unused(model: Model, space: DimensionSpace | None = None, *, forward: Forward = run_images) -> Model:
    """A smaller dense model with the same outputs, up to rounding: in float32 1e-6 of the largest one.

    The given model is not changed. Doing it again changes nothing. The plan is the result's ``sidt_plan``.

    Args:
        model: any model that has a space.
        space: its space, if it is at hand.
        forward: runs a model on a batch ``(images,)``; a detector's runs its backbone.

    Raises:
        InputError: the model has no space, or none of its forwards takes the sizes that are left.
    """
    space = space or space_for(model)
    folded = fold_constants(model, space, forward=forward)
    return slice_model(folded, unused_plan(folded, space))


def unused_plan(model: nn.Module, space: DimensionSpace | None = None) -> DimensionPlan:
    """The plan that keeps what is read; slicing by it changes no output.

    Each head chooses its own q/k and v units to drop, the same number in each: the least that any head that stays
    could. At least one of them stays.

    Args:
        model: a model whose constants are folded (:func:`fold_constants`); else they count as read.
        space: its space, if it is at hand.
    """
    space = space or space_for(model)
    keep: dict[str, Array] = {}
    for dimension in _free(space, "mlp"):
        keep[dimension.name] = np.flatnonzero(_read(model, space, dimension))
    for heads, owner in space.attention.items():
        if not space.sizes[heads]:
            continue
        qk, v = sorted((d for d in space.dimensions.values() if d.per == heads), key=lambda d: d.kind)
        live = _read(model, space, v)
        own = space.dimensions[heads]
        mixed = [t for name in space.mixing(heads) for t in _touched(space, own, name, 1, model.get_parameter(name))]
        used = np.flatnonzero(_any([np.asarray(live.any(1)), *mixed]))
        stay = np.arange(len(live)) if own.fixed or own.normed else used
        keep[heads] = stay
        if not len(stay):
            continue
        if not (v.fixed or v.normed):
            keep[v.name] = _alike(live[stay])
        if not qk.fixed and is_bilinear(model.get_submodule(owner), space.forwards):
            keep[qk.name] = _alike(_compared(model, space, qk)[stay])
    return DimensionPlan(space, keep)


def fold_constants(model: Model, space: DimensionSpace | None = None, *, forward: Forward = run_images) -> Model:
    """A copy with the same outputs in which no layer reads a hidden or v unit that its zero weights make constant.

    Args:
        model: any model that has a space.
        space: its space, if it is at hand.
        forward: runs a model on a batch ``(images,)``.
    """
    space = space or space_for(model)
    folded = copy.deepcopy(model)
    found = [written for d in (*_free(space, "mlp"), *_free(space, "v")) if (written := _written(model, space, d))]
    if not found:
        return folded
    watched = {path for written in found for path in (*written.readers, *written.convolutions)}
    seen = _extremes(model, space, watched, forward)
    for written in found:
        still = written.candidates.flatten()
        for path, filters in written.convolutions.items():
            still = still & (~filters | _is_zero(seen.get(path)))
        for path, columns in written.readers.items():
            if path in seen:
                _fold(folded.get_submodule(path), columns[still], *seen[path])
    return folded


# --- who reads a unit ----------------------------------------------------------------------------------------------


def _free(space: DimensionSpace, kind: str) -> Iterator[Dimension]:
    """The dimensions of a kind that have units and over which no statistics are taken."""
    sizes = space.sizes
    for d in space.dimensions.values():
        if d.kind == kind and not (d.fixed or d.normed) and d.size and (d.per is None or sizes[d.per]):
            yield d


def _readers(space: DimensionSpace, name: str) -> list[str]:
    """The weights whose columns a dimension's units are; none if something that is no layer reads them too."""
    found = []
    for weight, place in space.places.items():
        for dim, axis in enumerate(place.axes):
            if dim and name in names(axis):
                if dim > 1 or weight not in space.trace.positions:
                    return []
                found.append(weight)
    return found


def _touched(space: DimensionSpace, dimension: Dimension, place: str, dim: int, tensor: Tensor) -> list[Units]:
    """For each stretch of a tensor axis that holds a dimension: which units have an entry that is not zero."""
    along = (tensor.detach() != 0).movedim(dim, 0).reshape(tensor.shape[dim], -1).any(1).cpu().numpy()
    found = []
    for at, view, kept in views(space.places[place].axes[dim], space.sizes, dimension.name, space.per):
        rest = tuple(position for position in range(len(view)) if position not in kept)
        found.append(np.asarray(along[list(at)].reshape(view).any(axis=rest)))
    return found


def _read(model: nn.Module, space: DimensionSpace, dimension: Dimension) -> Units:
    """Which units of a dimension are read: all, if it is not known by whom."""
    readers = _readers(space, dimension.name)
    parts = [t for r in readers for t in _touched(space, dimension, r, 1, model.get_parameter(r))]
    shape = (dimension.size,) if dimension.per is None else (space.sizes[dimension.per], dimension.size)
    return _any(parts) if parts else np.ones(shape, dtype=bool)


def _any(parts: list[Units]) -> Units:
    found: Units = np.logical_or.reduce(parts)
    return found


def _compared(model: nn.Module, space: DimensionSpace, qk: Dimension) -> Units:
    """Which q/k units tell keys apart, shape [heads, size].

    The first rows that write them are q's and the next are k's, as the forwards for sliced sizes split them.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights: list[Units] = []
    biases: list[Units] = []
    for name, place in space.places.items():
        for dim, axis in enumerate(place.axes):
            if qk.name in names(axis):
                (weights if len(place.axes) > 1 else biases).extend(_touched(space, qk, name, dim, tensors[name]))
    if len(weights) != 2 or len(biases) not in (0, 2):
        return np.ones((space.sizes[qk.per or ""], qk.size), dtype=bool)
    q, k = weights
    return k & (q | biases[0]) if biases else k & q


def _alike(live: Units) -> Array:
    """The units that stay, as many in each row: all that live, and of the others what makes rows equal.

    Args:
        live: boolean, shape [heads, size].

    Returns:
        Shape [heads, kept], at least one kept.
    """
    count = max(int(live.sum(1).max()), 1)
    kept: Array = np.sort(np.argsort(~live, axis=1, kind="stable")[:, :count], axis=1)  # the living come first
    return kept


# --- what a constant is --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Written:
    """Units that are written with zero weights alone.

    Attributes:
        candidates: boolean, shape [units] or [parents, units].
        readers: for each module that reads them, the column of each unit, shape [parents * units].
        convolutions: for each depthwise convolution between, which units' filters are not zero, same shape.
    """

    candidates: Tensor
    readers: Mapping[str, Tensor]
    convolutions: Mapping[str, Tensor]


def _written(model: nn.Module, space: DimensionSpace, dimension: Dimension) -> _Written | None:
    """The units of a dimension that may be constant; ``None`` if there are none."""
    dense: list[Units] = []
    depthwise: dict[str, Units] = {}
    for name, place in space.places.items():
        if len(place.axes) > 1 and dimension.name in names(place.axes[0]):
            if name not in space.trace.positions:
                return None
            touched = _touched(space, dimension, name, 0, model.get_parameter(name))
            path = name.rpartition(".")[0]
            if getattr(model.get_submodule(path), "groups", 1) > 1:
                depthwise[path] = _any(touched)
            else:
                dense += touched
    readers = {name.rpartition(".")[0]: _columns(space, dimension, name) for name in _readers(space, dimension.name)}
    if not dense or not readers:
        return None
    zero = ~_any(dense)
    for filters in depthwise.values():
        zero |= ~filters
    if not zero.any():
        return None
    filters_of = {path: torch.from_numpy(filters).flatten() for path, filters in depthwise.items()}
    return _Written(torch.from_numpy(zero), {p: c for p, c in readers.items() if c is not None}, filters_of)


def _columns(space: DimensionSpace, dimension: Dimension, weight: str) -> Tensor | None:
    """The column of each unit in a weight; ``None`` if a unit has several."""
    axis = space.places[weight].axes[1]
    found = views(axis, space.sizes, dimension.name, space.per)
    if len(found) != 1 or len(found[0].shape) != len(found[0].kept):
        return None
    return torch.tensor(found[0].at)


def _extremes(
    model: nn.Module, space: DimensionSpace, paths: set[str], forward: Forward
) -> dict[str, tuple[Tensor, Tensor]]:
    """The least and the largest value of each input of some layers over random images, float64 on the CPU."""
    twin = explicit(model, space).double().cpu()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> None:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].movedim(-1 if isinstance(module, nn.Linear) else 1, -1).flatten(0, -2)
            low, high = x.amin(0), x.amax(0)
            if path in seen:
                low, high = torch.minimum(seen[path][0], low), torch.maximum(seen[path][1], high)
            seen[path] = low, high

        twin.get_submodule(path).register_forward_pre_hook(see)

    for path in paths:
        watch(path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *space.trace.input_size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        forward(twin, (images,))
    return seen


def _is_zero(extremes: tuple[Tensor, Tensor] | None) -> Tensor:
    """Which inputs are always 0, so that a zero-padded border does not differ from them."""
    if extremes is None:
        return torch.tensor(False)
    return (extremes[0] == 0) & (extremes[1] == 0)


def _fold(reader: nn.Module, columns: Tensor, low: Tensor, high: Tensor) -> None:
    """Move what a layer reads from constant inputs into its bias, in place.

    Args:
        reader: a linear layer or a convolution.
        columns: its inputs that are written with zero weights alone.
        low: the least value of each input.
        high: the largest.
    """
    weight, bias = reader.get_parameter("weight"), getattr(reader, "bias", None)
    value = (low + high)[columns] / 2
    still = (high - low)[columns] <= _STILL * (1 + value.abs())
    # A kernel may see a border of zeros; a layer without a bias has nowhere to put a constant.
    takes = bias is not None and weight.shape[2:].numel() == 1
    if not takes:
        still &= value == 0
    columns, value = columns[still], value[still]
    with torch.no_grad():
        if bias is not None and takes:
            read = weight.flatten(1)[:, columns.to(weight.device)].double().cpu()
            bias.copy_(bias.double().cpu() + read @ value)
        weight[:, columns.to(weight.device)] = 0
