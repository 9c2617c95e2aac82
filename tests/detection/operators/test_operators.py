"""mmcv's operators without a compiler, through mmcv's own functions, against their definitions."""

import subprocess
import sys
from math import ceil, exp, floor

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.autograd import gradcheck

import sidt.detection  # noqa: F401  puts the operators in place

mmcv_ops = pytest.importorskip("mmcv.ops")

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random_boxes(count, dtype, size=20.0):
    corners = torch.rand(count, 4, dtype=dtype) * size
    return torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] / 2 + 0.5], 1)


def random_rois(count, images, dtype, size=20.0):
    return torch.cat([torch.randint(images, (count, 1)).to(dtype), random_boxes(count, dtype, size)], 1)


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


def bilinear(image, y, x):
    """[C, H, W] at a point; 0 more than a pixel outside, and the border's value less than a pixel outside."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros_like(image[:, 0, 0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = floor(y), floor(x)
    bottom, right, dy, dx = min(top + 1, height - 1), min(left + 1, width - 1), y - top, x - left
    upper = image[:, top, left] * (1 - dx) + image[:, top, right] * dx
    return upper * (1 - dy) + (image[:, bottom, left] * (1 - dx) + image[:, bottom, right] * dx) * dy


def roi_align_loop(x, rois, size, scale, ratio, mode, aligned):
    shift, least = (0.5, 0.0) if aligned else (0.0, 1.0)
    out = x.new_zeros(len(rois), x.shape[1], *size)
    for k, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        start, sides = (y1 * scale - shift, x1 * scale - shift), (max((y2 - y1) * scale, least), (x2 - x1) * scale)
        bin_sizes = (sides[0] / size[0], max(sides[1], least) / size[1])
        counts = [ratio or ceil(side) for side in bin_sizes]
        for i in range(size[0]):
            for j in range(size[1]):
                points = [
                    bilinear(
                        x[int(image)],
                        start[0] + (i + (a + 0.5) / counts[0]) * bin_sizes[0],
                        start[1] + (j + (b + 0.5) / counts[1]) * bin_sizes[1],
                    )
                    for a in range(counts[0])
                    for b in range(counts[1])
                ]
                values = torch.stack(points)
                out[k, :, i, j] = values.mean(0) if mode == "avg" else values.max(0).values
    return out


class TestRoiAlign:
    @BOTH
    @pytest.mark.parametrize("mode", ["avg", "max"])
    @pytest.mark.parametrize("aligned", [True, False])
    @pytest.mark.parametrize("ratio", [0, 1, 2])
    def test_is_its_definition(self, dtype, mode, aligned, ratio):
        x = torch.randn(2, 3, 11, 9, dtype=dtype)
        rois = torch.cat([random_rois(6, 2, dtype), torch.tensor([[1, 3, 3, 3.4, 3.2], [0, -9, -9, 60, 60]]).to(dtype)])
        out = mmcv_ops.roi_align(x, rois, (3, 2), 0.5, ratio, mode, aligned)
        # Torch computes float32 points as the loop computes float64 ones, but for rounding.
        torch.testing.assert_close(out, roi_align_loop(x, rois, (3, 2), 0.5, ratio, mode, aligned))

    @BOTH
    def test_by_hand(self, dtype):
        x = torch.arange(16, dtype=dtype).reshape(1, 1, 4, 4)
        rois = torch.tensor([[0, 1, 1, 3, 3]], dtype=dtype)
        whole = [[5.0, 6.0], [9.0, 10.0]]  # bins of a pixel: their middles are the pixels' middles
        assert mmcv_ops.roi_align(x, rois, 2, 1.0, 1, "avg", True)[0, 0].tolist() == whole
        half = [[7.5, 8.5], [11.5, 12.5]]  # pixels are taken for their upper left corners
        assert mmcv_ops.roi_align(x, rois, 2, 1.0, 1, "avg", False)[0, 0].tolist() == half

    @pytest.mark.parametrize("mode", ["avg", "max"])
    @pytest.mark.parametrize("aligned", [True, False])
    @pytest.mark.parametrize("ratio", [0, 2])
    def test_gradient(self, mode, aligned, ratio):
        x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
        rois = random_rois(3, 2, torch.float64, 10.0)
        assert gradcheck(lambda x: mmcv_ops.roi_align(x, rois, (2, 3), 0.5, ratio, mode, aligned), (x,))

    @BOTH
    @pytest.mark.parametrize("mode", ["avg", "max"])
    def test_no_boxes_and_boxes_without_area(self, dtype, mode):
        x = torch.randn(1, 2, 4, 4, dtype=dtype, requires_grad=True)
        none = mmcv_ops.roi_align(x, torch.zeros(0, 5, dtype=dtype), 2, 1.0, 0, mode)
        flat = mmcv_ops.roi_align(x, torch.tensor([[0, 2, 2, 2, 2]], dtype=dtype), 2, 1.0, 0, mode)
        assert none.shape == (0, 2, 2, 2)
        assert not flat.any()
        (none.sum() + flat.sum()).backward()
        assert not x.grad.any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_takes_16_bit_floats(self, dtype):
        x, rois = torch.randn(2, 3, 8, 8).to(dtype), random_rois(4, 2, dtype)
        out = mmcv_ops.roi_align(x, rois, 2, 0.5, 2)
        assert out.dtype == dtype
        torch.testing.assert_close(out, mmcv_ops.roi_align(x.float(), rois.float(), 2, 0.5, 2).to(dtype))


def roi_pool_loop(x, rois, size, scale):
    out = x.new_zeros(len(rois), x.shape[1], *size)
    height, width = x.shape[2:]
    for k, (image, x1, y1, x2, y2) in enumerate((rois * torch.tensor([1, *[scale] * 4])).tolist()):
        across, down = (x2 + scale - x1) / size[1], (y2 + scale - y1) / size[0]
        for i in range(size[0]):
            for j in range(size[1]):
                rows = slice(max(floor(i * down + y1), 0), min(max(ceil((i + 1) * down + y1), 0), height))
                columns = slice(max(floor(j * across + x1), 0), min(max(ceil((j + 1) * across + x1), 0), width))
                if across > 0 and down > 0 and x[0, 0, rows, columns].numel():
                    out[k, :, i, j] = x[int(image), :, rows, columns].amax((1, 2))
    return out


class TestRoiPool:
    @BOTH
    def test_is_its_definition(self, dtype):
        x = torch.randn(2, 3, 11, 9, dtype=dtype)
        outside = torch.tensor([[0, -9, -9, -5, -5], [1, 30, 3, 40, 9], [0, 8, 8, 2, 9], [1, -9, -9, 60, 60]])
        rois = torch.cat([random_rois(8, 2, dtype), outside.to(dtype)])
        torch.testing.assert_close(mmcv_ops.roi_pool(x, rois, (3, 2), 0.5), roi_pool_loop(x, rois, (3, 2), 0.5))

    @BOTH
    def test_by_hand(self, dtype):
        x = torch.arange(16, dtype=dtype).reshape(1, 1, 4, 4).requires_grad_()
        out = mmcv_ops.roi_pool(x, torch.tensor([[0, 0, 0, 1, 3], [0, 2, 2, 3, 3]], dtype=dtype), (2, 1))
        assert out.flatten().tolist() == [5.0, 13.0, 11.0, 15.0]
        out.sum().backward()
        assert x.grad.flatten().nonzero().flatten().tolist() == [5, 11, 13, 15]

    def test_boxes_are_not_rounded(self):
        """Where mmcv and torchvision differ: the box ends before row 2.875 here, and with row round(2.625) there."""
        x, rois = torch.arange(16.0).reshape(1, 1, 4, 4), torch.tensor([[0, 4, 4, 10.5, 10.5]])
        assert mmcv_ops.roi_pool(x, rois, 1, 0.25).item() == 10
        assert torchvision.ops.roi_pool(x, rois, 1, 0.25).item() == 15

    def test_gradient(self):
        x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
        rois = torch.cat([random_rois(3, 2, torch.float64, 10.0), torch.tensor([[0, 9, 9, 0, 0]]).double()])
        assert gradcheck(lambda x: mmcv_ops.roi_pool(x, rois, (2, 3), 0.5), (x,))

    def test_no_boxes(self):
        x = torch.randn(1, 2, 4, 4, requires_grad=True)
        out = mmcv_ops.roi_pool(x, torch.zeros(0, 5), 2)
        out.sum().backward()
        assert out.shape == (0, 2, 2, 2)
        assert not x.grad.any()


def sigmoid_focal(x, target, gamma, alpha, weight=None):
    p, hit = x.sigmoid(), F.one_hot(target, x.shape[1] + 1)[:, :-1].to(x)
    loss = -hit * alpha * (1 - p) ** gamma * p.log() - (1 - hit) * (1 - alpha) * p**gamma * (1 - p).log()
    return loss if weight is None else loss * torch.cat([weight, weight.new_ones(1)])[target][:, None]


def softmax_focal(x, target, gamma, alpha, weight=None):
    p = x.softmax(1)[torch.arange(len(x)), target]
    return -alpha * (1 - p) ** gamma * p.log() * (1.0 if weight is None else weight[target])


class TestFocalLoss:
    @BOTH
    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_sigmoid(self, dtype, weighted, gamma, reduction):
        x = torch.randn(6, 4, dtype=dtype, requires_grad=True)
        target, weight = torch.tensor([0, 3, 4, 1, 4, 2]), torch.rand(4, dtype=dtype) if weighted else None
        loss = mmcv_ops.sigmoid_focal_loss(x, target, gamma, 0.25, weight, reduction)
        expected = sigmoid_focal(x, target, gamma, 0.25, weight)
        expected = {"none": expected, "mean": expected.sum() / 6, "sum": expected.sum()}[reduction]
        torch.testing.assert_close(loss, expected)
        got, wanted = (torch.autograd.grad(value.sum(), x)[0] for value in (loss, expected))
        torch.testing.assert_close(got, wanted)

    @BOTH
    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_softmax(self, dtype, weighted, gamma, reduction):
        x = torch.randn(6, 4, dtype=dtype, requires_grad=True)
        target, weight = torch.tensor([0, 3, 3, 1, 0, 2]), torch.rand(4, dtype=dtype) if weighted else None
        loss = mmcv_ops.softmax_focal_loss(x, target, gamma, 0.25, weight, reduction)
        expected = softmax_focal(x, target, gamma, 0.25, weight).sum() / (6 if reduction == "mean" else 1)
        torch.testing.assert_close(loss, expected)
        got, wanted = (torch.autograd.grad(value, x)[0] for value in (loss, expected))
        torch.testing.assert_close(got, wanted)

    @BOTH
    def test_by_hand(self, dtype):
        x = torch.zeros(1, 2, dtype=dtype)  # every p is a half
        loss = mmcv_ops.sigmoid_focal_loss(x, torch.tensor([1]), 2.0, 0.25, None, "none")
        log2 = torch.tensor(2.0, dtype=dtype).log()
        torch.testing.assert_close(loss, torch.stack([0.75 * 0.25 * log2, 0.25 * 0.25 * log2])[None])

    def test_gradients(self):
        x, target = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 3, 1])
        assert gradcheck(lambda x: mmcv_ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "none"), (x,))
        assert gradcheck(lambda x: mmcv_ops.softmax_focal_loss(x, target.clamp(max=2), 2.0, 0.25, None, "sum"), (x,))

    @pytest.mark.parametrize("loss", ["sigmoid_focal_loss", "softmax_focal_loss"])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    def test_certain_predictions_stay_finite(self, loss, gamma):
        x = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
        value = getattr(mmcv_ops, loss)(x, torch.tensor([0, 0]), gamma, 0.25, None, "sum")
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()

    def test_a_negative_target_has_no_softmax_loss(self):
        x = torch.randn(3, 2, requires_grad=True)
        loss = mmcv_ops.softmax_focal_loss(x, torch.tensor([1, -1, 0]), 2.0, 0.25, None, "none")
        assert loss[1] == 0 < loss[0]

    def test_no_rows(self):
        x = torch.zeros(0, 3, requires_grad=True)
        loss = mmcv_ops.sigmoid_focal_loss(x, torch.zeros(0, dtype=torch.int64), 2.0, 0.25, None, "sum")
        loss.backward()
        assert loss == 0
        assert x.grad.shape == (0, 3)


CASES = pytest.mark.parametrize(
    ("groups", "deform_groups", "stride", "padding", "dilation"),
    [(1, 1, 1, 1, 1), (2, 1, (2, 1), (1, 0), 1), (1, 2, 1, (0, 2), (1, 2)), (2, 4, 2, 1, 1)],
)


def deform_inputs(weight_groups, deform_groups, stride, padding, dilation, dtype=torch.float64):
    x, weight = torch.randn(2, 4, 6, 5, dtype=dtype), torch.randn(6, 4 // weight_groups, 3, 2, dtype=dtype)
    height, width = F.conv2d(x, weight, None, stride, padding, dilation, weight_groups).shape[2:]
    offset = torch.randn(2, deform_groups * 12, height, width, dtype=dtype)
    mask = torch.rand(2, deform_groups * 6, height, width, dtype=dtype)
    return x, offset, mask, weight, torch.randn(6, dtype=dtype)


class TestDeformableConvolution:
    @BOTH
    @CASES
    def test_without_offsets_it_is_a_convolution(self, dtype, groups, deform_groups, stride, padding, dilation):
        x, offset, mask, weight, bias = deform_inputs(groups, deform_groups, stride, padding, dilation, dtype)
        zeros, geometry = torch.zeros_like(offset), (stride, padding, dilation, groups)
        out = mmcv_ops.deform_conv2d(x, zeros, weight, *geometry, deform_groups)
        torch.testing.assert_close(out, F.conv2d(x, weight, None, *geometry))
        out = mmcv_ops.modulated_deform_conv2d(
            x, zeros, torch.full_like(mask, 0.5), weight, bias, *geometry, deform_groups
        )
        torch.testing.assert_close(out, F.conv2d(x, weight / 2, bias, *geometry))

    @BOTH
    def test_whole_offsets_shift_the_image(self, dtype):
        x, weight = torch.randn(1, 2, 6, 7, dtype=dtype), torch.randn(3, 2, 3, 3, dtype=dtype)
        offset = torch.tensor([1.0, -2.0], dtype=dtype).repeat(9)[None, :, None, None].expand(1, 18, 6, 7).contiguous()
        moved = F.pad(x, (2, 0, 0, 1))[:, :, 1:, :7]  # one down, two left: what was there is read
        # Of the frame, only the image itself is moved; the convolution's padding is the same zeros.
        out = mmcv_ops.deform_conv2d(x, offset, weight, 1, 1)[..., 1:-1, 1:-1]
        torch.testing.assert_close(out, F.conv2d(moved, weight, None, 1, 1)[..., 1:-1, 1:-1])

    @BOTH
    def test_groups_of_offsets_and_masks_have_their_own_channels(self, dtype):
        x, weight = torch.randn(1, 4, 5, 5, dtype=dtype), torch.randn(4, 4, 1, 1, dtype=dtype)
        offset = torch.zeros(1, 4, 5, 5, dtype=dtype)
        offset[:, 3] = 1  # the second group reads one to the right
        mask = torch.ones(1, 2, 5, 5, dtype=dtype)
        mask[:, 0] = 3  # the first counts threefold
        moved = torch.cat([3 * x[:, :2], F.pad(x[:, 2:], (0, 1))[..., 1:]], 1)
        out = mmcv_ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 0, 1, 1, 2)
        torch.testing.assert_close(out, F.conv2d(moved, weight))

    def test_the_first_offsets_of_a_larger_map_are_read(self):
        """As mmcv's own do, which DyHead stands on."""
        x, offset, mask, weight, bias = deform_inputs(1, 1, 1, 1, 1)
        larger = [torch.cat([t.flatten(1), torch.randn(2, 3 * t[0].numel(), dtype=t.dtype)], 1) for t in (offset, mask)]
        shapes = [(2, t.shape[1], 2 * t.shape[2], 2 * t.shape[3]) for t in (offset, mask)]
        inputs = [t.view(shape).requires_grad_() for t, shape in zip(larger, shapes, strict=True)]
        out = mmcv_ops.modulated_deform_conv2d(x, *inputs, weight, bias, 1, 1)
        own = [t.requires_grad_() for t in (offset, mask)]
        expected = mmcv_ops.modulated_deform_conv2d(x, *own, weight, bias, 1, 1)
        assert torch.equal(out, expected)
        found = torch.autograd.grad(out.square().sum(), inputs)
        for grad, small in zip(found, torch.autograd.grad(expected.square().sum(), own), strict=True):
            assert torch.equal(grad.flatten(1)[:, : small[0].numel()], small.flatten(1))
            assert not grad.flatten(1)[:, small[0].numel() :].any()

    @CASES
    def test_gradients(self, groups, deform_groups, stride, padding, dilation):
        x, offset, mask, weight, bias = (
            t.requires_grad_() for t in deform_inputs(groups, deform_groups, stride, padding, dilation)
        )
        geometry = (stride, padding, dilation, groups, deform_groups)
        fast = {"fast_mode": True}
        assert gradcheck(lambda *t: mmcv_ops.deform_conv2d(*t, *geometry), (x, offset, weight), **fast)
        inputs = (x, offset, mask, weight, bias)
        assert gradcheck(lambda *t: mmcv_ops.modulated_deform_conv2d(*t, *geometry), inputs, **fast)
        assert gradcheck(lambda *t: mmcv_ops.modulated_deform_conv2d(*t, None, *geometry), inputs[:4], **fast)

    def test_only_the_weight_learns(self):
        x, offset, _, weight, _ = deform_inputs(1, 1, 1, 1, 1)
        weight.requires_grad_()
        assert gradcheck(lambda w: mmcv_ops.deform_conv2d(x, offset, w, 1, 1), (weight,), fast_mode=True)

    def test_steps_over_the_batch_change_nothing(self):
        x, offset, _, weight, _ = deform_inputs(1, 1, 1, 1, 1)
        one, all_at_once = (mmcv_ops.deform_conv2d(x, offset, weight, 1, 1, 1, 1, 1, False, n) for n in (1, 2))
        torch.testing.assert_close(one, all_at_once)

    def test_takes_16_bit_floats(self):
        x, offset, mask, weight, bias = (t.half() for t in deform_inputs(1, 1, 1, 1, 1))
        out = mmcv_ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1)
        wide = mmcv_ops.modulated_deform_conv2d(*(t.float() for t in (x, offset, mask, weight, bias)), 1, 1)
        assert out.dtype == torch.float16
        torch.testing.assert_close(out, wide.half())


class TestDeformableAttention:
    def inputs(self, dtype):
        shapes = torch.tensor([[4, 3], [2, 2]])
        value = torch.randn(2, 16, 2, 4, dtype=dtype)
        locations = torch.rand(2, 5, 2, 2, 3, 2, dtype=dtype) * 1.4 - 0.2
        weights = torch.rand(2, 5, 2, 2, 3, dtype=dtype)
        return [value, shapes, torch.tensor([0, 12]), locations, weights]

    @BOTH
    def test_is_mmcvs_pure_form(self, dtype):
        from mmcv.ops.multi_scale_deform_attn import (
            MultiScaleDeformableAttnFunction,
            multi_scale_deformable_attn_pytorch,
        )

        value, shapes, starts, locations, weights = self.inputs(dtype)
        learned = [t.requires_grad_() for t in (value, locations, weights)]
        out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
        pure = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
        torch.testing.assert_close(out, pure)
        direction = torch.randn_like(out)
        got, wanted = (torch.autograd.grad(result, learned, direction) for result in (out, pure))
        torch.testing.assert_close(got, wanted)

    def test_16_bit_values_stay_16_bit(self):
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

        value, *others = self.inputs(torch.float32)
        value = value.half().requires_grad_()
        out = MultiScaleDeformableAttnFunction.apply(value, *others, 64)
        out.sum().backward()
        assert out.dtype == value.grad.dtype == torch.float16


def test_other_operators_are_refused_when_they_are_called(refused):
    carafe = mmcv_ops.CARAFE(3, 1, 2)  # importing and building is no reason to refuse
    with refused("'carafe_forward'", "pip install --no-build-isolation", "onedl-mmcv=="):
        carafe(torch.randn(1, 4, 2, 2), torch.randn(1, 9, 4, 4))
    with pytest.raises(AttributeError, match="__path__"):
        _ = sys.modules["mmcv._ext"].__path__


def test_mmcv_says_that_nothing_was_compiled():
    assert mmcv_ops.get_compiler_version().startswith("not compiled: torchvision")
    assert mmcv_ops.get_compiling_cuda_version().startswith("not compiled: torchvision")


def python(program, **options):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_sidt_detection_is_cheap_and_once_is_enough():
    program = """if True:
        import sys, sidt.detection
        from sidt.detection.operators import provide
        assert not {"torch", "torchvision", "mmcv", "mmdet", "mmengine"} & set(sys.modules)
        before = list(sys.meta_path)
        provide()
        assert sys.meta_path == before
        print(type(before[-1]).__name__)
    """
    assert python(program) == "_Finder"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_module_is_found_first(tmp_path, compiled):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").touch()
    if compiled:
        (package / "_ext.py").write_text("nms = 'compiled'")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sidt.detection, mmcv._ext; print(mmcv._ext.nms)"
    )
    assert (python(program) == "compiled") == compiled
