"""Norms inside a sublayer that count the units that are gone."""

import torch
from timm.layers import LayerNorm
from torch import nn
from torch.testing import assert_close

from sidt.surgery.norms import count_what_is_gone


def test_what_is_gone_counts_as_zeros():
    norm, small = LayerNorm(8), LayerNorm(3)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(norm, name).uniform_()
            getattr(small, name).copy_(getattr(norm, name)[:3])
    count_what_is_gone(small, 8, "norm.weight")
    count_what_is_gone(small, 3, "norm.weight")  # of the sliced model sliced again: it is the dense one that counts
    x = torch.randn(2, 5, 8) * (torch.arange(8) < 3)
    assert_close(small(x[..., :3]), norm(x)[..., :3])


def test_other_norms_are_named(refused):
    with refused("mlp.norm.weight", "RMSNorm", "!"):
        count_what_is_gone(nn.RMSNorm(4), 8, "mlp.norm.weight")
    with refused("mlp.norm.weight", "without bias", "!"):
        count_what_is_gone(nn.LayerNorm(4, bias=False), 8, "mlp.norm.weight")
