"""RoIAlign: the values of a map at points in boxes, their mean or their maximum in each bin.

Boxes are [K, 5]: the image, x1, y1, x2, y2. What mmcv's two functions hand each other in ``argmax_y`` and ``argmax_x``
is which point of the bin was the largest, counted in rows and columns of points.
"""

from collections.abc import Iterator

import torch
import torchvision  # noqa: F401  registers the operators
from torch import Tensor

from sidt.detection.operators.precision import wide

__all__ = ["roi_align_backward", "roi_align_forward"]

MAX = 0  # the pool mode; 1 is the mean


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``output`` with the bins of the boxes.

    Args:
        input: [N, C, H, W].
        rois: [K, 5].
        output: [K, C, height, width].
        argmax_y: as ``output`` if the maximum is asked for, and empty otherwise.
        argmax_x: the same.
        aligned_height: bins down a box.
        aligned_width: bins across a box.
        spatial_scale: pixels of the map per unit of the boxes.
        sampling_ratio: points down and across a bin; 0 for about one a pixel.
        pool_mode: 0 for the maximum, 1 for the mean.
        aligned: boxes begin half a pixel earlier, and may be smaller than a pixel.
    """
    x, rois, bins = wide(input), rois.to(wide(input)), (aligned_height, aligned_width)
    if pool_mode != MAX:
        output.copy_(_points(x, rois, spatial_scale, *bins, sampling_ratio, aligned))
        return
    for chosen, (rows, columns) in _by_grid(rois, spatial_scale, bins, sampling_ratio, aligned):
        points = _points(x, rois[chosen], spatial_scale, bins[0] * rows, bins[1] * columns, 1, aligned)
        points = points.reshape(*points.shape[:2], bins[0], rows, bins[1], columns).transpose(3, 4)
        value, place = points.flatten(4).max(-1)
        output[chosen] = value.to(output)
        argmax_y[chosen], argmax_x[chosen] = (place // columns).to(output), (place % columns).to(output)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add to ``grad_input`` [N, C, H, W] what the bins' gradients [K, C, height, width] give; see the forward."""
    grad, rois, bins = wide(grad_output), rois.to(wide(grad_output)), (aligned_height, aligned_width)
    backward, shape = torch.ops.torchvision._roi_align_backward, grad_input.shape
    if pool_mode != MAX:
        grad_input += backward(grad, rois, spatial_scale, *bins, *shape, sampling_ratio, aligned)
        return
    for chosen, (rows, columns) in _by_grid(rois, spatial_scale, bins, sampling_ratio, aligned):
        place = (argmax_y[chosen] * columns + argmax_x[chosen]).long().unsqueeze(-1)
        points = grad.new_zeros(*place.shape[:-1], rows * columns).scatter_(-1, place, grad[chosen].unsqueeze(-1))
        points = points.reshape(*place.shape[:-1], rows, columns).transpose(3, 4).flatten(4).flatten(2, 3)
        fine = (bins[0] * rows, bins[1] * columns)
        grad_input += backward(points, rois[chosen], spatial_scale, *fine, *shape, 1, aligned)


def _points(x: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool) -> Tensor:
    """Means over the points of each bin; with the ratio 1, the points themselves."""
    bins: Tensor = torch.ops.torchvision.roi_align(x, rois, scale, height, width, ratio, aligned)
    return bins


def _by_grid(
    rois: Tensor, scale: float, bins: tuple[int, int], ratio: int, aligned: bool
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The boxes, as masks [K], that have the same rows and columns of points in a bin. Boxes without points are left
    out.
    """
    if ratio > 0:
        grids = torch.full((len(rois), 2), ratio, device=rois.device)
    else:
        corners = rois[:, 1:] * scale - (0.5 if aligned else 0.0)
        sides = (corners[:, 2:] - corners[:, :2]).flip(1).clamp(min=0.0 if aligned else 1.0)
        grids = (sides / sides.new_tensor(bins)).ceil().long()
    for rows, columns in sorted({(rows, columns) for rows, columns in grids.tolist() if rows > 0 and columns > 0}):
        yield (grids == grids.new_tensor([rows, columns])).all(1), (rows, columns)
