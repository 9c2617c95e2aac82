"""Overlaps of boxes and non-maximum suppression. Boxes are x1, y1, x2, y2; a side has the length x2 - x1 + offset."""

import torch
import torchvision
from torch import Tensor

from sidt.detection.operators.precision import wide

__all__ = ["bbox_overlaps", "nms", "nms_match", "softnms"]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Drop each box that overlaps a better one by more than the threshold.

    Args:
        boxes: [N, 4].
        scores: [N].
        iou_threshold: an overlap of exactly this is kept.
        offset: 0 or 1.

    Returns:
        Indices of the boxes that stay, the best first; of equal scores the first box first.
    """
    boxes, scores = wide(boxes), wide(scores).to(wide(boxes))
    widened = boxes + boxes.new_tensor([0, 0, offset, offset])
    # torchvision compares with a double: an overlap of 0.6 in float32 would be more than 0.6.
    threshold = torch.tensor(iou_threshold, dtype=boxes.dtype).item()
    kept: Tensor = torchvision.ops.nms(widened, scores, threshold)
    return kept


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Take the best box, lower the scores of the boxes that overlap it, and so on with the rest.

    A box is dropped when its score falls below ``min_score``; the best box of all always stays.

    Args:
        boxes: [N, 4].
        scores: [N].
        dets: [N, 5], its first rows are filled with boxes and their lowered scores in the order of taking.
        iou_threshold: the overlap from which on scores are lowered (methods 0 and 1).
        sigma: how wide the Gaussian is (method 2).
        min_score: the lowest score that stays.
        method: 0 sets scores to 0, 1 multiplies them by 1 - IoU, 2 by ``exp(-IoU^2 / sigma)``.
        offset: 0 or 1.

    Returns:
        Indices of the boxes in the order of taking.
    """
    scores, order = scores.clone(), torch.arange(len(boxes), device=boxes.device)
    taken = 0
    while taken < len(order):
        best = taken + int(scores[order[taken:]].argmax())
        order[[taken, best]] = order[[best, taken]]
        first, rest = order[taken], order[taken + 1 :]
        dets[taken, :4], dets[taken, 4] = boxes[first], scores[first]
        scores[rest] *= _decay(_overlaps(boxes[first], boxes[rest], offset), iou_threshold, sigma, method)
        order = torch.cat([order[: taken + 1], _closed(rest, scores[rest] >= min_score)])
        taken += 1
    return order


def _decay(overlap: Tensor, threshold: float, sigma: float, method: int) -> Tensor:
    if method == 2:
        return (-overlap.square() / sigma).exp()
    return torch.where(overlap < threshold, 1.0, 1 - overlap if method == 1 else 0.0)


def _closed(order: Tensor, stays: Tensor) -> Tensor:
    """The indices that stay; the last ones fill the gaps of the others, so that ties are broken as mmcv breaks them."""
    count = int(stays.sum())
    head, tail = order[:count].clone(), order[count:]
    head[~stays[:count]] = tail[stays[count:]].flip(0)
    return head


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes: one that NMS keeps, and those that it drops, by score.

    Args:
        dets: [N, 5], boxes and scores.
        iou_threshold: the overlap from which on a box is dropped.

    Returns:
        Indices of the boxes of each group.
    """
    boxes, groups = dets[:, :4], []
    order = dets[:, 4].sort(descending=True, stable=True).indices
    while len(order):
        first, rest = order[0], order[1:]
        dropped = _overlaps(boxes[first], boxes[rest], 0) >= iou_threshold
        groups.append([int(first), *rest[dropped].tolist()])
        order = rest[~dropped]
    return groups


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fill ``ious`` with the overlaps of boxes.

    Args:
        boxes1: [N, 4].
        boxes2: [M, 4].
        ious: [N, M], or [N] with ``aligned``.
        mode: 0 for intersection over union, 1 for intersection over the area of the first box.
        aligned: the i-th box with the i-th.
        offset: 0 or 1.
    """
    first = boxes1 if aligned else boxes1.unsqueeze(1)
    shared = _intersection(first, boxes2, offset)
    area = _area(first, offset)
    ious.copy_(shared / (area if mode == 1 else area + _area(boxes2, offset) - shared))


def _overlaps(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """The IoU of [4] and [N, 4]: [N]. Two boxes without area do not overlap."""
    shared = _intersection(box, boxes, offset)
    return (shared / (_area(box, offset) + _area(boxes, offset) - shared)).nan_to_num(0.0)


def _intersection(a: Tensor, b: Tensor, offset: int) -> Tensor:
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + offset
    return sides.clamp(min=0).prod(-1)


def _area(boxes: Tensor, offset: int) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2] + offset).prod(-1)
