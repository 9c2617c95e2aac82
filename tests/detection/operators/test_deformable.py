"""Deformable convolutions and deformable attention: special cases, definitions, gradients."""

import pytest
import torch
import torch.nn.functional as F
from mmcv import ops as mmcv_ops
from torch.autograd import gradcheck

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


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
