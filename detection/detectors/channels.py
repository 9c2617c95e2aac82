"""Channels of a detector's neck and heads as dimensions: what layers write, apply norms to, add up and read.

They are seen in one forward without data, and not told by the classes of necks and heads. Layers whose outputs are
added up, and those that read what several layers write, tie these channels together. Channels that anything else is
done to stay whole: those that a head gives, that are reshaped or concatenated, or that a weight reads in a way that is
not known. Under a GroupNorm the units are its groups: a group that goes changes nothing for the others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sidt.detection.detectors.streams import tensors_in
from sidt.space.axes import Axis
from sidt.space.space import Dimension, DimensionSpace, Place
from sidt.space.trace import InputSize, meta_copy
from sidt.surgery.moments import argument

_ITSELF = {  # each channel of the result is made of the same channel alone
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "silu", "silu_", "gelu", "hardswish", "hardswish_", "sigmoid"),
    *("sigmoid_", "tanh", "exp", "interpolate", "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "dropout"),
    *("adaptive_avg_pool2d", "clone", "contiguous", "detach", "float", "to", "type_as", "clamp"),
    *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "mul", "mul_", "__mul__", "__rmul__"),
    *("__imul__", "div", "__truediv__"),
}
_FLATTENED = {"flatten", "view", "reshape"}
_NORMS = (F.group_norm, F.batch_norm)
Cut = Callable[[Tensor, Sequence[Tensor], str], None]  # regions, the maps that they are cut out of, by which module

# Given a detector, an image and its maps, runs all heads on the maps, and tells of regions that are cut out of them.
# Gives the names of heads that could not be run, and what the others give.
Heads = Callable[[Any, Tensor, Sequence[Tensor], Cut], tuple[list[str], list[Any]]]


@dataclass(frozen=True)
class _At:
    """Where the channels of a tensor stand: an axis of ``each`` entries for each channel of a set."""

    tensor: Tensor  # kept, so that its id is not another one's
    dim: int
    set: int
    each: int


@dataclass
class _Channels(TorchFunctionMode):
    """Sees where sets of channels are written, read and normalised.

    Attributes:
        names: the parameters and buffers of neck and heads, by id.
        sizes: of each set, its channels.
        parents: of each set, one that it is the same as, or itself.
        whole: the sets that stay whole.
        groups: of sets under a GroupNorm, the channels in a group.
        grouping: the weights of GroupNorms.
        axes: for tensors of the neck and the heads, the set and the entries for each channel along an axis.
        tensors: what flows, by id.
        seen: the tensors of neck and heads that something was given.
    """

    names: Mapping[int, str]
    sizes: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    whole: set[int] = field(default_factory=set)
    groups: dict[int, set[int]] = field(default_factory=dict)
    grouping: set[str] = field(default_factory=set)
    axes: dict[tuple[str, int], tuple[int, int] | None] = field(default_factory=dict)
    tensors: dict[int, _At] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Make the mode itself."""
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = list(tensors_in([args, kwargs]))
        own = [t for t in given if id(t) in self.names]
        flowing = [self.tensors[id(t)] for t in given if id(t) in self.tensors]
        made = list(tensors_in(out))
        if not made or not (own or flowing):
            return out
        self.seen |= {self.names[id(t)] for t in own}
        name = getattr(func, "__name__", "")
        if func in (F.conv2d, F.linear):
            self._layer(func, args, kwargs, out)
        elif func in _NORMS:
            self._norm(func, args, kwargs, out)
        elif name in _ITSELF and all(t.numel() == 1 for t in own):
            self._itself(given, flowing, out)
        elif name in _FLATTENED and len(flowing) == 1 and not own:
            self._flattened(flowing[0], out)
        else:
            self.keep_whole(given)
        return out

    def root(self, channels: int) -> int:
        """The set that stands for all that are the same."""
        while self.parents[channels] != channels:
            channels = self.parents[channels]
        return channels

    def keep_whole(self, tensors: Any) -> None:
        """Channels that something else is done to; of a weight, all that it writes and reads."""
        for tensor in tensors_in(tensors):
            if id(tensor) in self.tensors:
                self.whole.add(self.root(self.tensors[id(tensor)].set))
            for dim in range(tensor.ndim) if id(tensor) in self.names else ():
                self._stands(self.names[id(tensor)], dim, None)

    def same(self, tensors: Sequence[Tensor], other: Tensor) -> int | None:
        """Let another tensor [B, C, ...] have the channels of some; ``None`` if it is not known which they are."""
        found = [self.tensors.get(id(tensor)) for tensor in tensors]
        if not found or any(at is None or at.dim != 1 or at.each != 1 for at in found):
            self.keep_whole(list(tensors))
            return None
        sets = [at.set for at in found if at is not None]
        for channels in sets[1:]:
            self._unite(sets[0], channels)
        self._flows(other, 1, sets[0], 1)
        return sets[0]

    def _flows(self, tensor: Any, dim: int, channels: int, each: int) -> None:
        if not isinstance(tensor, Tensor) or tensor.ndim <= dim or tensor.shape[dim] != self.sizes[channels] * each:
            self.whole.add(self.root(channels))
            return
        self.tensors[id(tensor)] = _At(tensor, dim, channels, each)

    def _unite(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        if one == other:
            return
        if self.sizes[one] != self.sizes[other]:
            self.whole |= {one, other}
            return
        self.parents[other] = one
        self.groups.setdefault(one, set()).update(self.groups.pop(other, ()))
        if other in self.whole:
            self.whole.add(one)

    def _stands(self, name: str, dim: int, at: tuple[int, int] | None) -> None:
        """Note what is along an axis of a tensor; all that ever is, is the same set."""
        before = self.axes.setdefault((name, dim), at)
        if before is None or at is None or before[1] != at[1]:
            self.whole |= {self.root(found[0]) for found in (before, at) if found is not None}
            self.axes[name, dim] = None
        else:
            self._unite(before[0], at[0])

    def _layer(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        x, weight = argument(args, kwargs, 0, "input", None), argument(args, kwargs, 1, "weight", None)
        bias, dim = argument(args, kwargs, 2, "bias", None), 1 if func is F.conv2d else out.ndim - 1
        name, at = self.names.get(id(weight)), self.tensors.get(id(x))
        grouped = func is F.conv2d and (argument(args, kwargs, 6, "groups", None) or 1) != 1
        if name is None or grouped or (at is not None and at.dim != dim):
            self.keep_whole([x, weight, bias])
            return
        self._stands(name, 1, None if at is None else (at.set, at.each))
        written = self.axes.get((name, 0))
        if (name, 0) not in self.axes:
            written = (len(self.sizes), 1)
            self.sizes.append(len(weight))
            self.parents.append(written[0])
            self.axes[name, 0] = written
        if isinstance(bias, Tensor) and id(bias) in self.names:
            self._stands(self.names[id(bias)], 0, written)
        elif isinstance(bias, Tensor):  # made of something else
            self.keep_whole([weight])
        if written is not None:
            self._flows(out, dim, written[0], 1)

    def _norm(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        at = self.tensors.get(id(argument(args, kwargs, 0, "input", None)))
        if func is F.group_norm:
            count = argument(args, kwargs, 1, "num_groups", None)
            of = [argument(args, kwargs, 2, "weight", None), argument(args, kwargs, 3, "bias", None)]
        else:
            count = None
            of = [
                argument(args, kwargs, *a, None)
                for a in ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
            ]
        # Which module has a GroupNorm's number of groups, its weight says.
        known = all(not isinstance(t, Tensor) or id(t) in self.names for t in of) and (
            count is None or of[0] is not None
        )
        if at is None or at.dim != 1 or at.each != 1 or not known:
            self.keep_whole([args, kwargs])
            return
        for tensor in of:
            if isinstance(tensor, Tensor):
                self._stands(self.names[id(tensor)], 0, (at.set, 1))
        if count is not None:
            self.groups.setdefault(self.root(at.set), set()).add(self.sizes[at.set] // count)
            self.grouping.add(self.names[id(of[0])])
        self._flows(out, 1, at.set, 1)

    def _itself(self, given: Sequence[Tensor], flowing: Sequence[_At], out: Any) -> None:
        first = flowing[0] if flowing else None
        if first is None:
            return
        others = [t for t in given if id(t) not in self.tensors]
        there = [t.shape[first.dim] for t in others if t.ndim > first.dim]
        alike = all((at.dim, at.each, at.tensor.ndim) == (first.dim, first.each, first.tensor.ndim) for at in flowing)
        if not alike or any(size != 1 for size in there) or any(0 < t.ndim <= first.dim for t in others):
            self.keep_whole(given)
            return
        for at in flowing[1:]:
            self._unite(first.set, at.set)
        for tensor in tensors_in(out):
            self._flows(tensor, first.dim, first.set, first.each)

    def _flattened(self, at: _At, out: Tensor) -> None:
        shape = (at.tensor.shape[0], math.prod(at.tensor.shape[1:]))
        if at.dim != 1 or tuple(out.shape) != shape:
            self.keep_whole([at.tensor])
            return
        self._flows(out, 1, at.set, shape[1] // self.sizes[at.set])


@dataclass(frozen=True)
class Channels:
    """The channels of a neck and of heads.

    Attributes:
        dimensions: those that may shrink, by the modules that write them first.
        axes: for a tensor of the detector and one of its axes, what it is made of.
        attributes: for each attribute that repeats a size, its axis.
        maps: for each map of the neck, the axis that its channels are, or ``None`` where they stay whole.
    """

    dimensions: Mapping[str, Dimension]
    axes: Mapping[tuple[str, int], Axis]
    attributes: Mapping[str, Axis]
    maps: tuple[Axis | None, ...]

    def within(self, space: DimensionSpace) -> DimensionSpace:
        """A detector's space with them."""
        places = dict(space.places)
        for (name, dim), axis in self.axes.items():
            place = places.get(name, Place(((),), ".".join(name.split(".")[:2]), True))  # a norm's statistics
            places[name] = replace(place, axes=(*place.axes[:dim], axis, *place.axes[dim + 1 :]))
        return replace(
            space,
            dimensions={**space.dimensions, **self.dimensions},
            places=places,
            attributes={**space.attributes, **self.attributes},
        )


def channels_outside(detector: nn.Module, input_size: InputSize, heads: Heads) -> Channels:
    """The channels of a detector's neck and heads.

    Args:
        detector: it is not changed.
        input_size: channels, height, width of an image that it takes.
        heads: runs all heads.
    """
    model: Any = meta_copy(detector)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    outside = {name: t for name, t in tensors.items() if not name.startswith("backbone.")}
    watch = _Channels({id(tensor): name for name, tensor in outside.items()})
    extractors: dict[str, int] = {}

    def cut(regions: Tensor, maps: Sequence[Tensor], path: str) -> None:
        if (channels := watch.same(maps, regions)) is not None:
            extractors[path] = channels

    image = torch.empty(1, *input_size, device="meta", dtype=next(model.parameters()).dtype)
    with torch.no_grad(), watch:
        maps = model.extract_feat(image)
        missed, given = heads(model, image, maps, cut)
    watch.keep_whole(given)
    # What could not be run, or was not, may read the maps.
    parts = {name.partition(".")[0] for name, _ in model.named_parameters()} - {"backbone", "neck"}
    if missed or any(not any(name.startswith(f"{part}.") for name in watch.seen) for part in parts):
        watch.keep_whole(list(maps))
    unseen = {
        n for n in outside if n not in watch.seen and outside[n].ndim > 0 and n not in dict(model.named_buffers())
    }
    shared = _shared(model)
    for (name, _), at in watch.axes.items():
        if at is not None and (name in shared or name.partition(".")[0] in {n.partition(".")[0] for n in unseen}):
            watch.whole.add(watch.root(at[0]))
    return _named(watch, outside, extractors, maps)


def _named(
    watch: _Channels, outside: Mapping[str, Tensor], extractors: Mapping[str, int], maps: Sequence[Tensor]
) -> Channels:
    """The sets that may shrink, with names."""
    whole = {watch.root(channels) for channels in watch.whole}
    whole |= {root for root, counts in watch.groups.items() if len(counts) > 1}
    read = {watch.root(at[0]) for (_, dim), at in watch.axes.items() if dim == 1 and at is not None}
    names: dict[int, str] = {}
    for tensor in outside:
        at = watch.axes.get((tensor, 0)) if outside[tensor].ndim > 1 else None
        root = None if at is None else watch.root(at[0])
        if root is not None and root in read - whole:
            names.setdefault(root, tensor.rpartition(".")[0])
    per = {root: next(iter(watch.groups.get(root) or {1})) for root in names}

    def axis(channels: int, each: int = 1) -> Axis | None:
        root = watch.root(channels)
        if root not in names:
            return None
        return ((names[root], *(n for n in (per[root], each) if n > 1)),)

    found = {key: axis(*at) for key, at in watch.axes.items() if at is not None}
    attributes = {f"{path}.out_channels": axis(channels) for path, channels in extractors.items()}
    for weight in watch.grouping:
        if (place := found.get((weight, 0))) is not None:
            attributes[f"{weight.rpartition('.')[0]}.num_groups"] = ((place[0][0],),)
    known = [watch.tensors.get(id(m)) for m in maps]
    return Channels(
        {
            name: Dimension(name, "channels", watch.sizes[root] // per[root], None, (), False, channels=per[root])
            for root, name in names.items()
        },
        {key: place for key, place in found.items() if place is not None},
        {path: place for path, place in attributes.items() if place is not None},
        tuple(None if at is None else axis(at.set) for at in known),
    )


def _shared(model: nn.Module) -> set[str]:
    """The tensors that several modules have."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(prefix=path, recurse=False):
            owners.setdefault(id(tensor), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}
