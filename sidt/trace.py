"""One forward on the meta device: how often each weight is used, and what attention multiplies.

Multiply-adds of a layer are its weight's size times the number of positions it is applied to, so one trace
gives the cost of every plan in closed form. The totals are PyTorch's own flop counter's, halved (it counts a
multiply-add as 2).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sidt.errors import InputError

InputSize = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Trace:
    """What one image costs.

    Attributes:
        positions: for each weight of a linear layer or convolution, how many positions it is applied to.
        module_macs: multiply-adds under each module, by name ("" is the whole model).
        input_size: channels, height, width of the image.
    """

    positions: Mapping[str, int]
    module_macs: Mapping[str, int]
    input_size: InputSize


def input_size_of(model: nn.Module) -> InputSize:
    """The image size that a backbone was built for, by timm's conventions.

    Raises:
        InputError: the model does not say; the caller must give it.
    """
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels = getattr(model, "in_chans", None) or cfg.get("input_size", (3,))[0]
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg.get("input_size", (3,))[1:]
    if not built_for:
        raise InputError(f"{type(model).__name__} does not say its image size; give input_size=(3, height, width)")
    height, width = built_for
    return int(channels), int(height), int(width)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without storage: the same modules, with every tensor on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


class _Positions(TorchFunctionMode):
    """Counts, for each weight, the positions that linear layers and convolutions apply it to."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.positions: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.linear or func in _CONVOLUTIONS:
            weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[1]
            name = self.weights.get(id(weight))
            if name is not None:
                positions = out.numel() // weight.shape[0]
                self.positions[name] = self.positions.get(name, 0) + positions
        return out


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def trace(model: nn.Module, input_size: InputSize | None = None) -> Trace:
    """Trace one image through a model, without computing anything.

    Raises:
        InputError: the model does not take an image of that size.
    """
    size = input_size or input_size_of(model)
    model = meta_copy(model)
    mode = _Positions({id(p): name for name, p in model.named_parameters()})
    counter = FlopCounterMode(display=False)
    image = torch.empty(1, *size, device="meta", dtype=next(model.parameters()).dtype)
    try:
        # The math backend shows attention as the two matrix products it is, on every device and version.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, mode:
            model(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{type(model).__name__} does not take an input of {'x'.join(map(str, size))}: {reason}"
        ) from error
    root = type(model).__name__
    counts = counter.get_flop_counts()
    macs = {"": sum(counts.get("Global", {}).values()) // 2}
    for name, operations in counts.items():
        if name.startswith(root + "."):
            macs[name.removeprefix(root + ".")] = sum(operations.values()) // 2
    return Trace(mode.positions, macs, size)
