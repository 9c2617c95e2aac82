"""A neck or heads of a detector with fewer channels, for MMDetection's configs."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT
from torch import nn

from sidt.errors import InputError
from sidt.space.axes import names
from sidt.space.binding import get_attribute
from sidt.space.space import DimensionSpace
from sidt.surgery.slicing import follow, set_attribute

SLICED = "SlicedPart"
_OF_MAPS = ("in_channels", "in_index")  # what says which maps a module reads; it stays where others look for it


@ROOT.register_module(name=SLICED)
def sliced_part(
    dense: Mapping[str, Any], shapes: Mapping[str, Sequence[int | None]], attributes: Mapping[str, int], **more: Any
) -> nn.Module:
    """The architecture that a plan leaves of a neck or of heads, for a detector's config: its checkpoint brings the
    weights.

    Args:
        dense: the config of the dense neck or heads.
        shapes: of its parameters and buffers that are smaller; None for an axis that is as it was.
        attributes: that repeat a size.
        more: what MMDetection adds to the config; the dense one gets it.

    Returns:
        The sliced module itself, of the class that ``dense`` names.

    Raises:
        InputError: the dense module has no such parameter, or a smaller one.
    """
    part: nn.Module = MODELS.build({**dense, **more})
    tensors = dict(part.named_parameters()) | dict(part.named_buffers())
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or len(shape) != tensor.ndim or not all(map(_fits, shape, tensor.shape)):
            seen = "is not there" if tensor is None else f"has shape {list(tensor.shape)}"
            raise InputError(f"{name} of the {dense.get('type')} {seen}, and cannot be cut to {list(shape)}")
        path, _, leaf = name.rpartition(".")
        module, first = part.get_submodule(path), tensor.detach()[tuple(slice(n) for n in shape)].clone()
        setattr(module, leaf, nn.Parameter(first) if isinstance(tensor, nn.Parameter) else first)
        follow(module)
    for path, size in attributes.items():
        if get_attribute(part, path) is None:
            raise InputError(f"the {dense.get('type')} has no {path}")
        set_attribute(part, path, size)
    return part


def _fits(size: int | None, dense: int) -> bool:
    return size is None or 0 < size <= dense


def slice_parts(config: Config, detector: nn.Module, space: DimensionSpace) -> None:
    """Turn the configs of a dense detector's neck and heads into those of the sliced ones, in place."""
    channels = {name for name, d in space.dimensions.items() if d.kind == "channels"}
    tensors = dict(detector.named_parameters()) | dict(detector.named_buffers())
    shapes: dict[str, dict[str, list[int | None]]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for name, place in space.places.items():
        there = [bool(names(axis) & channels) for axis in place.axes]
        if any(there):
            part, inside = _part_of(config, name)
            sizes = zip(tensors[name].shape, there, strict=True)
            shapes.setdefault(part, {})[inside] = [size if cut else None for size, cut in sizes]
    for path, axis in space.attributes.items():
        if names(axis) & channels:
            part, inside = _part_of(config, path)
            attributes.setdefault(part, {})[inside] = int(get_attribute(detector, path))
    for part, own in shapes.items():
        owner, _, leaf = part.rpartition(".")
        parent: Any = get_attribute(config.model, owner) if owner else config.model
        key: Any = int(leaf) if leaf.isdigit() else leaf
        given = parent[key].to_dict()
        before = given if given["type"] == SLICED else {"dense": dict(given), "shapes": {}, "attributes": {}}
        parent[key] = {
            "type": SLICED,
            "dense": {k: v for k, v in before["dense"].items() if k not in _OF_MAPS},
            "shapes": {**before["shapes"], **own},
            "attributes": {**before["attributes"], **attributes.get(part, {})},
            **{k: given[k] for k in _OF_MAPS if k in given},
        }


def _part_of(config: Config, name: str) -> tuple[str, str]:
    """Where the config is of the part of a detector that a tensor is in, and its name in there."""
    first, _, rest = name.partition(".")
    if isinstance(config.model[first], list | tuple):
        index, _, rest = rest.partition(".")
        first = f"{first}.{index}"
    return first, rest
