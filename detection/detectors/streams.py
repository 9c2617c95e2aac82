"""Widths of a detector's backbone that can be rotated: those whose maps the layers of the neck read as they are.

In a segmentor without a neck, these layers are of its heads.

The way back is then in these layers, as it is in those behind any other norm. What the neck makes of a map is seen, in
one forward without data, and not told by its class.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sidt.detection.detectors.backbones import TimmBackbone
from sidt.space.axes import Axis
from sidt.space.finding import family_of
from sidt.space.streams import Stream, stream_of
from sidt.space.trace import InputSize, Trace, meta_copy
from sidt.surgery.moments import LAYERS, argument, in_one_group

_NOTHING = ("_",)  # as the files of the families say that nothing in the backbone reads a norm


def detector_streams(
    detector: nn.Module,
    module: nn.Module,
    prefix: str,
    tensors: Mapping[str, tuple[Axis, ...]],
    trace: Trace,
    outside: Mapping[str, tuple[str, ...] | str],
) -> dict[str, Stream | str]:
    """For some widths of a detector's backbone, how they can be rotated, or why they cannot.

    Args:
        detector: the detector.
        module: the part of its backbone that has the dimension space.
        prefix: what the names in that part begin with.
        tensors: the axes of the detector's tensors by name.
        trace: of the detector.
        outside: for each width, the weights of the neck that read it, or why it cannot be rotated.
    """
    family = family_of(module).within(prefix)
    if isinstance(detector.backbone, TimmBackbone):
        family = replace(family, norms={**family.norms, "backbone.norms.{i}": _NOTHING})
    return {
        width: read if isinstance(read, str) else stream_of(width, tensors, trace, family, read)
        for width, read in outside.items()
    }


def readers_of_maps(
    detector: nn.Module, paths: Sequence[str], maps: Sequence[str], input_size: InputSize
) -> dict[str, tuple[str, ...] | str]:
    """For each width that a map has, the weights that read it as it is, or what else is made of it.

    Args:
        detector: the detector.
        paths: where in it the neck is, or the heads that read its maps.
        maps: for each map of the backbone, the width that its channels are.
        input_size: channels, height, width of an image that it takes.
    """
    meta: Any = meta_copy(detector)
    image = torch.empty(1, *input_size, device="meta", dtype=next(meta.parameters()).dtype)
    with torch.no_grad():
        given = meta.backbone(image)
        uses = _Uses((given,) if isinstance(given, Tensor) else tuple(given), meta)
        with uses:
            for path in paths:
                try:
                    meta.get_submodule(path)(given)
                except TypeError:  # such as the later heads of a cascade
                    return dict.fromkeys(maps, f"{path} reads more than maps")
    found: dict[str, tuple[str, ...] | str] = {}
    for width in dict.fromkeys(maps):
        own = [i for i, name in enumerate(maps) if name == width]
        others = sorted({other for i in own for other in uses.others[i]})
        readers = tuple(dict.fromkeys(reader for i in own for reader in uses.readers[i]))
        found[width] = f"not only layers are applied to its map, but {', '.join(others)}" if others else readers
    return found


class _Uses(TorchFunctionMode):
    """Sees the weights that read some maps, and the names of all else that makes a tensor of one."""

    def __init__(self, maps: Sequence[Tensor], model: nn.Module) -> None:
        super().__init__()
        self.maps, self.names = maps, {id(weight): name for name, weight in model.named_parameters()}
        self.readers: list[list[str]] = [[] for _ in maps]
        self.others: list[list[str]] = [[] for _ in maps]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {id(tensor) for tensor in tensors_in([args, kwargs])}
        for features, readers, others in zip(self.maps, self.readers, self.others, strict=True):
            if id(features) in given and any(True for _ in tensors_in(out)):
                reader = self._weight(func, args, kwargs)
                (others.append(getattr(func, "__name__", str(func))) if reader is None else readers.append(reader))
        return out

    def _weight(self, func: Any, args: Any, kwargs: Any) -> str | None:
        """The name of the weight of a layer."""
        if func not in LAYERS or not in_one_group(func, args, kwargs):
            return None
        return self.names.get(id(argument(args, kwargs, 1, "weight")))


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)
