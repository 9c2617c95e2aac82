"""Where gates stand: which rows and columns of which weights a unit's factor multiplies, for each placement."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sidt.errors import InputError
from sidt.space.axes import Axis, Stretch, axis_size, names, views
from sidt.space.families import KINDS, Kind
from sidt.space.space import Dimension, DimensionSpace, Place

Placement = Literal["sidt", "vtp", "vit-slim"]


@dataclass(frozen=True)
class Site:
    """Where a gate multiplies: the entries ``at`` along one axis of a parameter, a product of the sizes ``view``.

    The gate has the axes ``kept`` of the product and is repeated along the others.
    """

    parameter: str
    dim: int
    at: tuple[int, ...]
    view: tuple[int, ...]
    kept: tuple[int, ...]
    power: int = 1


@dataclass(frozen=True)
class Gate:
    """One learnable factor for each unit of ``shape``, and where it multiplies."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    sites: tuple[Site, ...]


def _stretches(space: DimensionSpace, axis: Axis, name: str) -> list[Stretch]:
    """Where the units of a dimension stand along an axis; heads count only where they hold q/k or v units."""
    children = [child for child, parent in space.per.items() if parent == name]
    return [
        Stretch(at, shape, kept[:1] if children else kept)
        for each in children or [name]
        for at, shape, kept in views(axis, space.sizes, each, space.per)
    ]


def _readers(space: DimensionSpace, name: str) -> list[Site]:
    """The input columns of every layer that reads the units of a dimension; also of those that mix heads."""
    reading = [
        Site(parameter, 1, *stretch)
        for parameter, place in _weights(space)
        for stretch in _stretches(space, place.axes[1], name)
    ]
    mixing = [
        Site(parameter, 1, *stretch)
        for parameter in space.mixing(name)
        for stretch in views(space.places[parameter].axes[1], space.sizes, name, space.per)
    ]
    return list(dict.fromkeys([*reading, *mixing]))


def _first_writers(space: DimensionSpace, name: str) -> list[Site]:
    """The output rows, weight and bias, that write a dimension first: q, of the q/k units that no layer reads."""
    found: dict[bool, Site] = {}
    for parameter, place in space.places.items():
        axes = () if place.is_buffer else place.axes[:1]  # a detector has parameters without an axis
        for stretch in (stretch for axis in axes for stretch in _stretches(space, axis, name)):
            found.setdefault(len(place.axes) > 1, Site(parameter, 0, *stretch))
    return list(found.values())


def _weights(space: DimensionSpace) -> Iterator[tuple[str, Place]]:
    return ((name, place) for name, place in space.places.items() if not place.is_buffer and len(place.axes) > 1)


def _own(space: DimensionSpace, name: str) -> Gate:
    """One gate for each unit of a dimension, at all who read it; or where it is written first, if nobody does."""
    dimension, sites = space.dimensions[name], _readers(space, name) or _first_writers(space, name)
    shape = (dimension.size,) if dimension.per is None else (space.sizes[dimension.per], dimension.size)
    return Gate(name, dimension.kind, shape, tuple(sites))


def _free(space: DimensionSpace, kinds: Iterable[Kind]) -> list[Dimension]:
    """The dimensions of some kinds that have units that may go."""
    sizes = space.sizes
    return [
        d
        for d in space.dimensions.values()
        if d.kind in kinds and not d.fixed and d.size and (d.per is None or sizes[d.per])
    ]


def _after_sidt(space: DimensionSpace, kinds: Iterable[Kind]) -> Iterator[Gate]:
    return (_own(space, dimension.name) for dimension in _free(space, kinds))


def _after_vtp(space: DimensionSpace, kinds: Iterable[Kind]) -> Iterator[Gate]:
    """One gate for each input column of each weight of a block."""
    inner = {d.name for d in space.dimensions.values() if d.kind != "width"}
    blocks = {p.block for p in space.places.values() if any(names(axis) & inner for axis in p.axes)}
    free = sorted(_free(space, kinds), key=lambda d: d.per is None)  # an input of proj is rather a v unit than a head
    for parameter, place in _weights(space):
        read = [d for d in free if place.block in blocks and _stretches(space, place.axes[1], d.name)]
        if read:
            size = axis_size(place.axes[1], space.sizes)
            yield Gate(parameter, read[0].kind, (size,), (Site(parameter, 1, tuple(range(size)), (size,), (0,)),))


def _after_vit_slim(space: DimensionSpace, kinds: Iterable[Kind]) -> Iterator[Gate]:
    """One gate that q, k and v of a unit of a head share, named after the heads; the others are as SiDT's.

    Where q/k units are pairs of rows (rotary positions), which of them a unit of v would share is nowhere said: it is
    a gate of v alone.
    """
    attention = any(kind in kinds for kind in ("heads", "qk", "v"))
    for dimension in _free(space, [kind for kind in kinds if kind in ("mlp", "width")]):
        yield _own(space, dimension.name)
    free = {d.name for d in _free(space, KINDS)}
    for heads in (d for d in space.dimensions.values() if d.kind == "heads" and d.size and attention):
        qk, v = sorted((d for d in space.dimensions.values() if d.per == heads.name), key=lambda d: d.kind)
        pairs = _are_pairs(space, qk)
        if qk.size != v.size and not pairs:
            raise InputError(
                f"vit-slim shares one gate between q, k and v, but {heads.name} has q/k of {qk.size} and v of {v.size} "
                "units; use placement sidt"
            )
        # The gates of q and of k meet in their product.
        sites = [replace(s, power=2) for s in _first_writers(space, qk.name)] if qk.name in free and not pairs else []
        sites += _readers(space, v.name) if v.name in free else []
        if sites:
            yield Gate(heads.name, "heads", (heads.size, v.size), tuple(sites))


def _are_pairs(space: DimensionSpace, qk: Dimension) -> bool:
    """Whether several rows of q stand for one unit."""
    terms = (term for place in space.places.values() for axis in place.axes for term in axis)
    return any(qk.name in term and any(type(s) is int for s in term) for term in terms)


_PLACEMENTS = {"sidt": _after_sidt, "vtp": _after_vtp, "vit-slim": _after_vit_slim}


def placed(space: DimensionSpace, placement: Placement, kinds: Iterable[Kind]) -> list[Gate]:
    """The gates of a placement on the dimensions of some kinds; see :func:`sidt.importance.gates.gated`.

    Raises:
        InputError: the placement is unknown or does not fit, or nothing can be gated.
    """
    if placement not in _PLACEMENTS:
        raise InputError(f"placement is {placement!r}; choose from {', '.join(get_args(Placement))}")
    kinds = tuple(kinds)
    if not (found := list(_PLACEMENTS[placement](space, kinds))):
        raise InputError(f"no dimension of this {space.model} can be gated; give other kinds than {list(kinds)}")
    return found
