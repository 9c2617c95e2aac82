"""Attention of unequal q/k and v sizes: exact, and by the fused kernel on CPU."""

import pytest
import torch
from backbones import VIT_TINY, dense
from torch.profiler import ProfilerActivity, profile

from sidt.allocation.timing import first_units
from sidt.surgery.attention import attend
from sidt.surgery.slicing import slice_model


@pytest.mark.parametrize("sizes", [(24, 40), (40, 24), (13, 5)])
def test_attention_of_unequal_sizes_is_exact(sizes):
    """Zeros fill up the smaller of q/k and v: outputs and gradients are those of attention written out."""
    qk, v = sizes
    q, k, w = (torch.randn(2, 3, 17, size, dtype=torch.float64, requires_grad=True) for size in (qk, qk, v))
    for mask in (None, torch.randn(1, 3, 17, 17, dtype=torch.float64)):
        expected = (q @ k.transpose(-2, -1) * 0.3 + (0 if mask is None else mask)).softmax(-1) @ w
        seen = attend(q, k, w, 0.3, mask)
        torch.testing.assert_close(seen, expected)
        weight = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad((out * weight).sum(), (q, k, w)) for out in (seen, expected))
        torch.testing.assert_close(ours, theirs)


def test_attention_of_unequal_sizes_is_fused_on_cpu():
    """The kernel for CPU is called, which takes one size only."""
    model, space = dense(VIT_TINY)
    small = slice_model(model, first_units(space, {"qk.0": 24, "v.0": 40, "qk.1": 40, "v.1": 8}))
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        small(torch.randn(1, *space.trace.input_size))
    names = [event.key for event in seen.key_averages() for _ in range(event.count)]
    assert sum("flash_attention_for_cpu" in name for name in names) == 2
