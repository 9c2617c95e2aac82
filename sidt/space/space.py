"""Dimension spaces: the searchable dimensions of a backbone, and every place where each of them lives.

A space is data. It is read from a file in ``search_spaces/`` that gives the axes of every parameter of one
family of backbones (:mod:`sidt.space.axes`), and is bound here to one model: every parameter must match exactly one
line or be in a module that stays whole, and every dimension must have one size.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sidt.errors import InputError
from sidt.space import axes
from sidt.space.axes import Axis
from sidt.space.binding import Binder, attribute_paths, begins_of, block_of, get_attribute
from sidt.space.families import Family, Kind, match_line, stays_whole
from sidt.space.finding import family_of
from sidt.space.streams import Stream, stream_of
from sidt.space.trace import InputSize, Trace, trace

VANISHING: tuple[Kind, ...] = ("heads", "mlp")  # kinds that may have no unit: their sublayer is then its output bias


@dataclass(frozen=True)
class Dimension:
    """A named axis of a backbone.

    Attributes:
        name: its name, such as ``hidden.3``.
        kind: what it is.
        size: number of units; for a dimension with a parent, units in each unit of the parent (1 if that has none).
        per: the parent whose units each choose their own, the same number in each (q/k and v sizes per head).
        index: where it stands: the block, or stage and block; empty for one that all share.
        fixed: whether it must stay whole.
        ordered: whether its units stand in order, as after a rotation: a plan keeps the first ones.
        normed: whether a norm inside its sublayer takes statistics over its units, in which those that go are zeros.
        channels: the channels of a unit: those of a GroupNorm's group, otherwise one.
    """

    name: str
    kind: Kind
    size: int
    per: str | None
    index: tuple[int, ...]
    fixed: bool
    ordered: bool = False
    normed: bool = False
    channels: int = 1

    def step(self, multiple: int) -> int:
        """The units that go at a time so that what is left are multiples of some channels; heads go singly."""
        return 1 if self.kind == "heads" else multiple // math.gcd(multiple, self.channels)


@dataclass(frozen=True)
class Place:
    """One tensor of the model: the axes it is made of, and the block that it belongs to."""

    axes: tuple[Axis, ...]
    block: str
    is_buffer: bool


@dataclass(frozen=True)
class DimensionSpace:
    """The dimensions of one backbone and every place where each lives.

    Attributes:
        model: name of the model's class.
        family: name of the file the space was read from.
        dimensions: by name, in the order of the file.
        places: by parameter (or buffer) name, in the model's order.
        attributes: for each attribute that repeats a size, its axis.
        attention: for each ``heads`` dimension, the module that it lives in.
        forwards: name of the module that has the attention forwards for sliced sizes.
        trace: what one image costs.
        streams: for each width, how it can be rotated, or why it cannot.
        counted: the start of the names of the places whose costs count; empty: all.
        tied: widths that the model's constructor makes of the heads and their size.
        own: the family, if its file does not come with SiDT: what is sliced keeps it.
    """

    model: str
    family: str
    dimensions: Mapping[str, Dimension]
    places: Mapping[str, Place]
    attributes: Mapping[str, Axis]
    attention: Mapping[str, str]
    forwards: str
    trace: Trace
    streams: Mapping[str, Stream | str]
    counted: str = ""
    tied: tuple[str, ...] = ()
    own: Family | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The dense size of every dimension."""
        return {name: dimension.size for name, dimension in self.dimensions.items()}

    @property
    def per(self) -> dict[str, str]:
        """The parent of each dimension that has one."""
        return {name: d.per for name, d in self.dimensions.items() if d.per is not None}

    def rotated(self) -> list[str]:
        """The widths whose units stand in order."""
        return [d.name for d in self.dimensions.values() if d.ordered]

    def ordered(self, widths: Collection[str]) -> "DimensionSpace":
        """The space of the same model with some of its widths rotated, so that their units stand in order."""
        changed = {n: replace(d, ordered=True) for n, d in self.dimensions.items() if n in widths}
        return replace(self, dimensions={**self.dimensions, **changed})

    def joined(self, other: "DimensionSpace") -> "DimensionSpace":
        """This space with the channels of a detector's neck and heads that another space of the same model has."""
        channels = {n: d for n, d in other.dimensions.items() if d.kind == "channels"}
        if not channels:
            return self
        places = {n: p for n, p in other.places.items() if any(axes.names(axis) & channels.keys() for axis in p.axes)}
        attributes = {path: axis for path, axis in other.attributes.items() if axes.names(axis) & channels.keys()}
        return replace(
            self,
            dimensions={**self.dimensions, **{n: d for n, d in channels.items() if n not in self.dimensions}},
            places={**self.places, **places},
            attributes={**self.attributes, **attributes},
        )

    def blocks(self) -> list[tuple[int, ...]]:
        """The indices of the blocks, in order of depth; last and without one, what stands in none (a pooling, or the
        channels of a detector's neck and heads).
        """
        return sorted({d.index for d in self.dimensions.values() if d.kind != "width"}, key=lambda i: (not i, i))

    def title(self, block: tuple[int, ...]) -> str:
        """What a block is called."""
        others = {d.kind for d in self.dimensions.values() if not d.index and d.kind != "width"}
        return ".".join(map(str, block)) or ("outside" if others == {"channels"} else "pool")

    def mixing(self, name: str) -> list[str]:
        """The weights that have the units of a dimension as their rows and as their columns, as of talking heads."""
        return [n for n, place in self.places.items() if sum(name in axes.names(axis) for axis in place.axes) > 1]

    def in_block(self, block: tuple[int, ...]) -> list[Dimension]:
        """The dimensions of a block: its own, and the widths that it shares with others."""
        return [
            d
            for d in self.dimensions.values()
            if d.index == block or (d.kind == "width" and d.index == block[: len(d.index)])
        ]


def _solve(equations: list[tuple[Axis, int]], dimensions: Mapping[str, tuple[Kind, str | None, Any]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    while True:
        found = dict(s for axis, extent in equations if (s := axes.solve(axis, extent, sizes)) is not None)
        found = {name: size for name, size in found.items() if size or dimensions[name][0] in VANISHING}
        if not found:
            break
        sizes |= found
    # No tensor tells how many units each of no heads has; plans say 1.
    return sizes | {name: 1 for name, (_, parent, _) in dimensions.items() if parent and sizes.get(parent) == 0}


def _fits(bound: tuple[Axis, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
    known = all(axes.names(axis) | axes.presences(axis) <= set(sizes) for axis in bound)
    return known and tuple(axes.axis_size(axis, sizes) for axis in bound) == shape


def space_for(
    model: nn.Module, input_size: InputSize | None = None, *, file: str | Path | None = None
) -> DimensionSpace:
    """Describe a backbone as a dimension space.

    Args:
        model: a backbone of a known family, dense or already sliced.
        input_size: channels, height, width of the images whose cost is counted; default: those it is for.
        file: a search-space file of your own, or a folder of them; default: see :mod:`sidt.space.finding`.

    Raises:
        InputError: the model has no space, a parameter matches no line (and is in no module that stays whole) or
            several, or sizes do not fit.
    """
    family = family_of(model) if file is None else family_of(model, Path(file))
    tensors: dict[str, tuple[Tensor, bool]] = {name: (p, False) for name, p in model.named_parameters()}
    tensors |= {name: (b, True) for name, b in model.named_buffers()}
    binder = Binder(family, model, begins_of(family, tensors))
    matches = {}
    missing = []
    for name, (_, is_buffer) in tensors.items():
        match = match_line(family, family.parameters, name)
        if match is not None:
            matches[name] = match
        elif not is_buffer and not stays_whole(family, name):
            missing.append(name)
    if missing:
        more = f" (and {len(missing) - 1} more: {', '.join(missing[1:9])})" if missing[1:] else ""
        raise InputError(
            f"{type(model).__name__}: the parameter {missing[0]}{more} has no axes; add a line for it to {family.file}"
        )
    indices = {
        name: binder.with_stages({k: int(v) for k, v in match.groupdict().items()})
        for name, (_, match) in matches.items()
    }
    for name, (line, _) in matches.items():
        binder.note_last(line, indices[name])

    bound = {}
    for name, (line, _) in matches.items():
        shape = tuple(tensors[name][0].shape)
        bound[name] = [binder.bind(a, shape, indices[name], name) for a in line.alternatives if len(a) == len(shape)]
        if not bound[name]:
            ranks = " or ".join(sorted({str(len(a)) for a in line.alternatives}))
            raise InputError(f"{family.file.name}: {name} has {len(shape)} axes, but its line gives {ranks}")
    repeated = {
        path: [binder.bind(a, (1,), binder.with_stages(variables), path)[0] for a in line.alternatives]
        for line in family.attributes
        for path, variables in attribute_paths(line, list(indices.values()), model)
    }
    equations = [(axes_[0], get_attribute(model, path)) for path, axes_ in repeated.items() if len(axes_) == 1]
    for name, alternatives in bound.items():
        if len(alternatives) == 1:
            equations += zip(alternatives[0], tensors[name][0].shape, strict=True)
    sizes = _solve(equations, binder.dimensions)

    places = {}
    for name, (tensor, is_buffer) in tensors.items():
        if name in matches:
            shape = tuple(tensor.shape)
            fitting = [alternative for alternative in bound[name] if _fits(alternative, shape, sizes)]
            several = len(fitting) > 1 and not matches[name][0].in_order
            if not fitting or (several and 0 not in shape):  # of nothing, every alternative is the same
                raise InputError(
                    f"{family.file.name}: {name} of {type(model).__name__} has shape {list(shape)}, which "
                    f"its line {matches[name][0].text!r} does not fit with {_seen(bound[name], sizes)}"
                )
            places[name] = Place(fitting[0], block_of(*matches[name], name), is_buffer)
        elif not is_buffer:
            places[name] = Place(tuple(((extent,),) for extent in tensor.shape), name.split(".")[0], is_buffer)
    attributes = {
        path: next((a for a in axes_ if _fits((a,), (get_attribute(model, path),), sizes)), axes_[-1])
        for path, axes_ in repeated.items()
    }
    dimensions = _dimensions(binder, places, sizes, getattr(model, "sidt_rotated", ()), _normed(model, places))
    # An axis of attributes alone has chosen alternatives, and is no factor.
    attributes = {
        path: axes.chosen(axis, set(dimensions))
        for path, axis in attributes.items()
        if axes.names(axis) <= set(dimensions)
    }
    places = {n: replace(p, axes=tuple(axes.chosen(a, set(dimensions)) for a in p.axes)) for n, p in places.items()}
    _check_heads(dimensions, family.file)
    attention = {d.name: owner_of(d.name, places) for d in dimensions.values() if d.kind == "heads"}
    cost, axes_of = trace(model, input_size), {name: place.axes for name, place in places.items()}
    return DimensionSpace(
        type(model).__name__,
        family.file.stem,
        dimensions,
        places,
        attributes,
        attention,
        family.forwards,
        cost,
        {d.name: stream_of(d.name, axes_of, cost, family) for d in dimensions.values() if d.kind == "width"}
        | _pooled_by_maximum(model, places),
        tied=tuple(name for name in dimensions if name.split(".")[0] in family.tied),
        own=family if family.text else None,
    )


def _pooled_by_maximum(model: nn.Module, places: Mapping[str, Place]) -> dict[str, str]:
    """Of the widths whose largest values a timm model's head reads, that these are others in another basis."""
    if "max" not in str(getattr(model, "global_pool", "")):
        return {}
    read = (axes.names(axis) for name, place in places.items() if name.startswith("head") for axis in place.axes)
    return {width: "its head reads the largest value of each unit" for names in read for width in names}


def _seen(alternatives: list[tuple[Axis, ...]], sizes: Mapping[str, int]) -> str:
    used = sorted({n for a in alternatives for axis in a for n in axes.names(axis) | axes.presences(axis)})
    return ", ".join(f"{name}={sizes.get(name, 'unknown')}" for name in used) or "no dimensions"


def _normed(model: nn.Module, places: Mapping[str, Place]) -> set[str]:
    """The dimensions that norms are over."""
    norms = {f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "normalized_shape")}
    return {n for name in norms & set(places) for axis in places[name].axes for n in axes.names(axis)}


def _dimensions(
    binder: Binder,
    places: Mapping[str, Place],
    sizes: Mapping[str, int],
    rotated: Collection[str],
    normed: Collection[str],
) -> dict[str, Dimension]:
    used = {n for place in places.values() for axis in place.axes for n in axes.names(axis)}
    order = {name: position for position, name in enumerate(binder.family.rules)}
    dimensions = {}
    for name in sorted(used, key=lambda n: (binder.dimensions[n][2], order[n.split(".")[0]])):
        kind, per, index = binder.dimensions[name]
        inside = name in normed and kind != "width"
        dimensions[name] = Dimension(name, kind, sizes[name], per, index, name in binder.fixed, name in rotated, inside)
    for parameter, place in places.items():
        for term in (term for axis in place.axes for term in axis):
            for name in (s for s in term if isinstance(s, str)):
                parent = dimensions[name].per
                before = term[: term.index(name)]
                if parent is None or parent in before:
                    continue
                if parent in term or not dimensions[name].fixed:  # each parent has its units in one block
                    raise InputError(
                        f"{binder.family.file.name}: {parameter} has {name} without {parent} before it; "
                        f"since each head chooses its own units, write the product, or "
                        f"{name.split('.')[0]}! to keep it whole"
                    )
    return dimensions


def _check_heads(dimensions: Mapping[str, Dimension], file: Path) -> None:
    for heads in (d.name for d in dimensions.values() if d.kind == "heads"):
        children = sorted(d.kind for d in dimensions.values() if d.per == heads)
        if children != ["qk", "v"]:
            raise InputError(
                f"{file.name}: {heads} needs one axis of kind qk and one of kind v, each 'per' it; "
                f"it has {', '.join(children) or 'none'}"
            )


def owner_of(dimension: str, places: Mapping[str, Place]) -> str:
    """The module whose parameters a dimension lives in: their longest common prefix."""
    holders = [name.split(".") for name, place in places.items() if any(dimension in axes.names(a) for a in place.axes)]
    shared = []
    for parts in zip(*holders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
