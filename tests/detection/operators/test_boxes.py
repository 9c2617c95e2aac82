"""NMS, soft-NMS and overlaps, by hand and against loops that are the definitions."""

from math import exp

import pytest
import torch
from mmcv import ops as mmcv_ops

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random_boxes(count, dtype, size=20.0):
    corners = torch.rand(count, 4, dtype=dtype) * size
    return torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] / 2 + 0.5], 1)


def iou(a, b, offset):
    ax1, ay1, ax2, ay2, bx1, by1, bx2, by2 = (float(x) for x in (*a, *b))
    width = max(0.0, min(ax2, bx2) - max(ax1, bx1) + offset)
    height = max(0.0, min(ay2, by2) - max(ay1, by1) + offset)
    areas = (ax2 - ax1 + offset) * (ay2 - ay1 + offset) + (bx2 - bx1 + offset) * (by2 - by1 + offset)
    return width * height / (areas - width * height)


class TestNms:
    @BOTH
    @pytest.mark.parametrize("offset", [0, 1])
    def test_is_its_definition(self, dtype, offset):
        boxes, scores = random_boxes(60, dtype), torch.rand(60, dtype=dtype)
        kept = []
        for i in scores.argsort(descending=True).tolist():
            if all(iou(boxes[i], boxes[k], offset) <= 0.3 for k in kept):
                kept.append(i)
        dets, indices = mmcv_ops.nms(boxes, scores, 0.3, offset)
        assert 1 < len(kept) < 60
        assert indices.tolist() == kept
        torch.testing.assert_close(dets, torch.cat([boxes[kept], scores[kept, None]], 1))

    @BOTH
    def test_offset_counts_the_last_pixel(self, dtype):
        boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 3]], dtype=dtype)  # IoU 1/3, or 4/8
        scores = torch.tensor([0.9, 0.8], dtype=dtype)
        assert mmcv_ops.nms(boxes, scores, 0.4, 0)[1].tolist() == [0, 1]
        assert mmcv_ops.nms(boxes, scores, 0.4, 1)[1].tolist() == [0]

    @BOTH
    def test_an_overlap_of_the_threshold_stays(self, dtype):
        boxes, scores = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 6]], dtype=dtype), torch.tensor([0.9, 0.8]).to(dtype)
        assert mmcv_ops.nms(boxes, scores, 0.6)[1].tolist() == [0, 1]
        assert mmcv_ops.nms(boxes, scores, 0.599)[1].tolist() == [0]

    @BOTH
    def test_of_equal_scores_the_first_box_is_first(self, dtype):
        boxes = torch.tensor([[0, 0, 4, 4], [9, 9, 12, 12], [0, 0, 4, 4], [9, 9, 12, 12]], dtype=dtype)
        assert mmcv_ops.nms(boxes, torch.full((4,), 0.5, dtype=dtype), 0.5)[1].tolist() == [0, 1]

    @BOTH
    def test_nothing_in_nothing_out(self, dtype):
        dets, indices = mmcv_ops.nms(torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=dtype), 0.5)
        assert (dets.shape, indices.shape, indices.dtype) == ((0, 5), (0,), torch.int64)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_takes_16_bit_floats(self, dtype):
        boxes, scores = random_boxes(30, dtype), torch.rand(30).to(dtype)
        expected = mmcv_ops.nms(boxes.float(), scores.float(), 0.5)[1]
        assert mmcv_ops.nms(boxes, scores, 0.5)[1].tolist() == expected.tolist()

    def test_batched_nms_keeps_classes_apart(self):
        boxes, scores = torch.tensor([[0.0, 0, 4, 4]] * 4), torch.tensor([0.5, 0.6, 0.7, 0.8])
        config = {"type": "nms", "iou_threshold": 0.5}
        dets, kept = mmcv_ops.batched_nms(boxes, scores, torch.tensor([0, 1, 0, 1]), config)
        assert kept.tolist() == [3, 2]
        torch.testing.assert_close(dets, torch.tensor([[0, 0, 4, 4, 0.8], [0, 0, 4, 4, 0.7]]))

    def test_nms_match_groups_what_nms_drops(self):
        boxes = torch.tensor([[0.0, 0, 4, 4], [9, 9, 12, 12], [0, 0, 4, 3], [0, 0, 4, 2]])
        dets = torch.cat([boxes, torch.tensor([[0.5], [0.9], [0.7], [0.6]])], 1)
        assert [g.tolist() for g in mmcv_ops.nms_match(dets, 0.6)] == [[1], [2, 3, 0]]
        assert mmcv_ops.nms_match(dets[:0], 0.6) == []


def soft_nms_loop(boxes, scores, threshold, sigma, least, method, offset):
    """The loop of the paper, with mmcv's order: a dropped box's place goes to the last one."""
    left = [[i, float(s)] for i, s in enumerate(scores)]
    taken = 0
    while taken < len(left):
        best = max(range(taken, len(left)), key=lambda j: left[j][1])
        left[taken], left[best] = left[best], left[taken]
        j = taken + 1
        while j < len(left):
            overlap = iou(boxes[left[taken][0]], boxes[left[j][0]], offset)
            factor = {"naive": 0.0, "linear": 1 - overlap, "gaussian": exp(-(overlap**2) / sigma)}[method]
            score = left[j][1] * (factor if overlap >= threshold or method == "gaussian" else 1.0)
            left[j][1] = score
            j += 1
        j = taken + 1
        while j < len(left):
            if left[j][1] < least:
                left[j] = left[-1]
                left.pop()
            else:
                j += 1
        taken += 1
    return [i for i, _ in left], [s for _, s in left]


class TestSoftNms:
    @BOTH
    @pytest.mark.parametrize("offset", [0, 1])
    @pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
    def test_is_its_definition(self, dtype, method, offset):
        boxes, scores = random_boxes(40, dtype), torch.rand(40, dtype=dtype)
        dets, kept = mmcv_ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
        indices, lowered = soft_nms_loop(boxes, scores, 0.3, 0.5, 0.05, method, offset)
        assert 1 < len(indices) < 40
        assert kept.tolist() == indices
        expected = torch.cat([boxes[indices], torch.tensor(lowered, dtype=dtype)[:, None]], 1)
        torch.testing.assert_close(dets, expected)

    @BOTH
    def test_by_hand(self, dtype):
        boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 2], [8, 8, 9, 9]], dtype=dtype)
        dets, kept = mmcv_ops.soft_nms(boxes, torch.tensor([0.9, 0.8, 0.5], dtype=dtype), 0.5, method="linear")
        assert kept.tolist() == [0, 2, 1]
        torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.5, 0.4], dtype=dtype))

    def test_ties_are_broken_as_mmcv_breaks_them(self):
        """The last box takes the place of the second, which is dropped."""
        boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [10, 0, 14, 4], [20, 0, 24, 4]])
        kept = mmcv_ops.soft_nms(boxes, torch.full((4,), 0.5), 0.5, method="naive")[1]
        assert kept.tolist() == [0, 3, 2]

    def test_boxes_without_area_do_not_overlap(self):
        """mmcv's documented example."""
        boxes = torch.tensor([[4.0, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]])
        for method in ("naive", "linear", "gaussian"):
            dets, kept = mmcv_ops.soft_nms(boxes, torch.tensor([0.9, 0.9, 0.5, 0.5, 0.4, 0.0]), 0.6, method=method)
            assert len(dets) == len(kept) == 5

    def test_the_best_stays_and_nothing_is_nothing(self):
        assert mmcv_ops.soft_nms(random_boxes(1, torch.float32), torch.tensor([1e-6]))[1].tolist() == [0]
        dets, kept = mmcv_ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
        assert (dets.shape, kept.shape) == ((0, 5), (0,))


@BOTH
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_bbox_overlaps(dtype, offset, aligned, mode):
    a, b = random_boxes(5, dtype), random_boxes(5, dtype)
    expected = mmcv_ops.bbox._bbox_overlaps_cpu(a, b, mode, aligned, offset)
    torch.testing.assert_close(mmcv_ops.bbox_overlaps(a, b, mode, aligned, offset), expected)
    if mode == "iou":
        assert float(expected.flatten()[0]) == pytest.approx(iou(a[0], b[0], offset), abs=1e-6)
