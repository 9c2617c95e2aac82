"""RoIAlign and RoIPool against loops that are the definitions, and their gradients."""

from math import ceil, floor

import pytest
import torch
import torchvision
from mmcv import ops as mmcv_ops
from torch.autograd import gradcheck

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random_boxes(count, dtype, size=20.0):
    corners = torch.rand(count, 4, dtype=dtype) * size
    return torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] / 2 + 0.5], 1)


def random_rois(count, images, dtype, size=20.0):
    return torch.cat([torch.randint(images, (count, 1)).to(dtype), random_boxes(count, dtype, size)], 1)


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
