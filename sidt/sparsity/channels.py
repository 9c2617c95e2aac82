"""Unused Path Removal for convolutions that follow one another: channels without a reader, or that are constant."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sidt.errors import InputError

# Each makes one entry of one, so that a channel stays a channel and a constant a constant; a dropout does in eval mode.
_ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Dropout,
)  # fmt: skip


def remove_unused_channels(chain: nn.Sequential) -> nn.Sequential:
    """The same convolutions without the channels between them that no output depends on; exact up to rounding.

    A channel between two convolutions goes if the second reads it with zero kernels alone, or if its filter is zero,
    so that it is a constant, and the second can take it over: always if the constant is 0; else if it pads no zeros
    (its border would not see the constant) and has a bias. One that goes may leave another unused, so this is repeated
    until nothing changes. One channel always stays. The chain given is not changed; what comes in and goes out keep
    their channels, since who else reads them is not known here.

    Left as they are: channels around anything that is not elementwise (norms, pooling, resizing) and convolutions in
    groups or transposed.

    Args:
        chain: plain convolutions and what stands between them, such as a detector's ``conv, ReLU, conv, ReLU``.

    Raises:
        InputError: there are no two convolutions in it.
    """
    result = copy.deepcopy(chain)
    if sum(isinstance(module, nn.Conv2d) for module in result) < 2:
        raise InputError("the chain has no two convolutions; give nn.Sequential(conv, activation, conv)")
    while any([_shrink(*pair) for pair in _pairs(result)]):  # a list: every pair, each time
        pass
    return result


def _pairs(chain: nn.Sequential) -> Iterator[tuple[nn.Conv2d, nn.Sequential, nn.Conv2d]]:
    """The convolutions that follow one another with only elementwise modules between, and these."""
    first: nn.Conv2d | None = None
    between: list[nn.Module] = []
    for module in chain:
        if type(module) is nn.Conv2d:
            if first is not None and first.groups == module.groups == 1:
                yield first, nn.Sequential(*between), module
            first, between = module, []
        elif isinstance(module, _ELEMENTWISE):
            between.append(module)
        else:
            first = None


def _shrink(first: nn.Conv2d, between: nn.Sequential, second: nn.Conv2d) -> bool:
    """Take the unused channels between two convolutions out, in place; whether there were any."""
    with torch.no_grad():
        constant = ~first.weight.flatten(1).any(1)
        value = _constants(first, between)
        if second.bias is None or (second.padding_mode == "zeros" and _pads(second)):
            constant &= value == 0
        unread = ~second.weight.transpose(0, 1).flatten(1).any(1)
        goes = constant | unread
        if goes.all():
            goes[0] = False
        if not goes.any():
            return False
        if second.bias is not None:
            moved = goes & constant
            kernels = second.weight.sum((2, 3), dtype=torch.float64)
            second.bias.copy_(second.bias.double() + kernels[:, moved] @ value[moved])
        _set(first, first.weight[~goes], None if first.bias is None else first.bias[~goes])
        _set(second, second.weight[:, ~goes], second.bias)
    return True


def _constants(first: nn.Conv2d, between: nn.Sequential) -> Tensor:
    """What the second convolution reads of each channel if its filter is zero, float64."""
    bias = first.weight.new_zeros(first.out_channels) if first.bias is None else first.bias
    return copy.deepcopy(between).eval()(bias.double())  # type: ignore[no-any-return]


def _pads(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same" and conv.weight.shape[2:].numel() > 1
    return any(conv.padding)


def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    conv.weight = nn.Parameter(weight.clone(), requires_grad=conv.weight.requires_grad)
    if bias is not None and conv.bias is not None:
        conv.bias = nn.Parameter(bias.clone(), requires_grad=conv.bias.requires_grad)
    conv.out_channels, conv.in_channels = weight.shape[:2]
