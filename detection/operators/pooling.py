"""RoIPool: the maximum of a map in each bin of a box.

torchvision's operator of this name rounds the boxes to whole pixels; mmcv rounds only the bins.
"""

import torch
from torch import Tensor

from sidt.detection.operators.precision import wide

__all__ = ["roi_pool_backward", "roi_pool_forward"]


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``output`` with the largest value of each bin, 0 where a bin is empty, and ``argmax`` with its pixel.

    Args:
        input: [N, C, H, W].
        rois: [K, 5]: the image, x1, y1, x2, y2; the last pixel belongs to the box.
        output: [K, C, height, width].
        argmax: integers, as ``output``: row * W + column, and -1 for an empty bin.
        pooled_height: bins down a box.
        pooled_width: bins across a box.
        spatial_scale: pixels of the map per unit of the boxes.
    """
    width, rois = input.shape[3], wide(rois)
    starts, ends = rois[:, 1:3] * spatial_scale, (rois[:, 3:] + 1) * spatial_scale
    ends = torch.where((ends > starts).all(1, keepdim=True), ends, starts)  # nothing is in a box turned inside out
    columns, has_column = _pixels(starts[:, 0], ends[:, 0], pooled_width, width)
    rows, has_row = _pixels(starts[:, 1], ends[:, 1], pooled_height, input.shape[2])
    for k, image in enumerate(rois[:, 0].long().tolist()):
        inside = (has_row[k][:, None, :, None] & has_column[k][None, :, None, :]).flatten(2)  # [height, width, pixels]
        pixels = (rows[k][:, None, :, None] * width + columns[k][None, :, None, :]).flatten(2)
        values = input[image].flatten(1)[:, pixels].masked_fill(~inside, -torch.inf)
        largest, place = values.max(-1)
        empty = ~inside.any(-1)
        output[k] = largest.masked_fill(empty, 0)
        found = pixels.expand_as(values).gather(-1, place.unsqueeze(-1)).squeeze(-1)
        argmax[k] = found.masked_fill(empty, -1).to(argmax)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add each bin's gradient [K, C, height, width] to its pixel of ``grad_input`` [N, C, H, W]; see the forward."""
    _, channels, height, width = grad_input.shape
    image = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)  # [K, C]
    pixel = image[..., None, None] * (height * width) + argmax
    found = argmax >= 0
    grad_input.view(-1).index_add_(0, pixel[found], grad_output[found])


def _pixels(start: Tensor, end: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """The pixels of each bin along one side of each box, [K, bins, pixels], and which of them are in it."""
    edges = start[:, None] + torch.arange(bins + 1, device=start.device) * ((end - start) / bins)[:, None]
    low, high = edges[:, :-1].floor().clamp(0, limit).long(), edges[:, 1:].ceil().clamp(0, limit).long()
    high = torch.where((end > start)[:, None], high, low)
    most = max(int((high - low).max()), 1) if len(start) else 1
    pixels = low[..., None] + torch.arange(most, device=start.device)
    return pixels.clamp(max=limit - 1), pixels < high[..., None]
