"""Deformable convolutions, whose offsets are y, x for each point of the kernel, and deformable attention.

The buffers for columns and ones that mmcv hands over, and its steps over a batch, are of no use here.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers the operators
from torch import Tensor

from sidt.detection.operators.precision import wide

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
]

# What mmcv calls stride, padding, dilation, groups and groups of offsets, in torchvision's order.
PLAIN = ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group")
MODULATED = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "group", "deformable_group")


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **options: Any
) -> None:
    """Fill ``output`` with a convolution at moved points.

    Args:
        input: [N, C, H, W].
        weight: [out, C / groups, kernel height, kernel width].
        offset: [N, offset groups * kernel height * kernel width * 2, height, width].
        output: [N, out, height, width].
        columns: not used.
        ones: not used.
        options: ``PLAIN``; others are not used.
    """
    output.copy_(_convolve(input, weight, offset, None, None, [options[name] for name in PLAIN]))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **options: Any,
) -> None:
    """Fill ``grad_input`` and ``grad_offset``; see :func:`deform_conv_forward`."""
    grads = _gradients(grad_output, input, weight, offset, None, [options[name] for name in PLAIN])
    grad_input.copy_(grads["input"])
    grad_offset.copy_(grads["offset"])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **options: Any,
) -> None:
    """Add ``scale`` times the weight's gradient to ``grad_weight``; see :func:`deform_conv_forward`."""
    # The gradient does not depend on the weight, which is not handed over: any of its shape will do.
    grads = _gradients(
        grad_output, input, torch.zeros_like(grad_weight), offset, None, [options[name] for name in PLAIN]
    )
    grad_weight += scale * grads["weight"]


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **options: Any,
) -> None:
    """The same with a factor for each point and a bias.

    Args:
        input: [N, C, H, W].
        weight: [out, C / groups, kernel height, kernel width].
        bias: [out]; not used without ``with_bias``.
        ones: not used.
        offset: [N, offset groups * kernel height * kernel width * 2, height, width]. It may be of a larger map, as in
            DyHead, and so may the mask: mmcv reads the first entries of an image as if they were of this shape.
        mask: [N, offset groups * kernel height * kernel width, height, width].
        output: [N, out, height, width].
        columns: not used.
        with_bias: there is a bias.
        options: ``MODULATED``; others are not used.
    """
    geometry = [options[name] for name in MODULATED]
    offset, mask = _first(offset, output), _first(mask, output)
    output.copy_(_convolve(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **options: Any,
) -> None:
    """Fill the gradients of :func:`modulated_deform_conv_forward`."""
    offset, mask = _first(offset, grad_output), _first(mask, grad_output)
    grads = _gradients(grad_output, input, weight, offset, mask, [options[name] for name in MODULATED])
    grad_input.copy_(grads["input"])
    grad_weight.copy_(grads["weight"])
    _fill(grad_offset, grads["offset"])
    _fill(grad_mask, grads["mask"])
    if with_bias:
        grad_bias.copy_(grads["bias"])


def _first(values: Tensor, output: Tensor) -> Tensor:
    """The first entries of each image as [N, C, height, width] of the output."""
    if values.shape[2:] == output.shape[2:]:
        return values
    shape = (len(values), values.shape[1], *output.shape[2:])
    return values.flatten(1)[:, : shape[1] * shape[2] * shape[3]].reshape(shape)


def _fill(buffer: Tensor, grad: Tensor) -> None:
    """Fill a buffer with the gradient of its first entries; that of others is zero."""
    flat = F.pad(grad.flatten(1), (0, buffer[0].numel() - grad[0].numel()))
    buffer.copy_(flat.view(buffer.shape))


def _convolve(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: list[int]
) -> Tensor:
    tensors = _tensors(input, weight, offset, mask, bias)
    output: Tensor = torch.ops.torchvision.deform_conv2d(*tensors, *geometry, mask is not None)
    return output


def _gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, geometry: list[int]
) -> Mapping[str, Tensor]:
    tensors = _tensors(input, weight, offset, mask, None)
    backward = torch.ops.torchvision._deform_conv2d_backward
    grads = backward(wide(grad_output), *tensors, *geometry, mask is not None)
    return dict(zip(("input", "weight", "offset", "mask", "bias"), grads, strict=True))


def _tensors(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """What torchvision's operators take; they want a mask and a bias even where there is none."""
    x = wide(input)
    mask = x.new_zeros(len(x), 1) if mask is None else wide(mask)
    bias = x.new_zeros(len(weight)) if bias is None else wide(bias)
    return x, wide(weight), wide(offset), mask, bias


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """Deformable attention over the maps of several levels.

    Args:
        value: [N, keys, heads, size], the levels one after the other.
        shapes: [levels, 2], height and width of each.
        starts: not used: the first key of each level follows from the shapes.
        locations: [N, queries, heads, levels, points, 2], x and y from 0 to 1.
        weights: [N, queries, heads, levels, points].
        im2col_step: not used.

    Returns:
        [N, queries, heads * size].
    """
    return _attend(value, shapes, locations, weights).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    im2col_step: int,
) -> None:
    """Fill the gradients of :func:`ms_deform_attn_forward`."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (value, locations, weights)]
        output = _attend(inputs[0], shapes, *inputs[1:])
    grads = torch.autograd.grad(output, inputs, grad_output.to(output))
    for buffer, grad in zip((grad_value, grad_locations, grad_weights), grads, strict=True):
        buffer.copy_(grad)


def _attend(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    # At call time: mmcv's module imports this one.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    output: Tensor = multi_scale_deformable_attn_pytorch(wide(value), shapes, wide(locations), wide(weights))
    return output
