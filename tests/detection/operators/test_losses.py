"""Focal losses against their formulas, and their gradients against autograd's."""

import pytest
import torch
import torch.nn.functional as F
from mmcv import ops as mmcv_ops
from torch.autograd import gradcheck

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


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
