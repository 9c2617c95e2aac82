"""Channels between convolutions: what is unused leaves, what a border shows stays."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sidt.sparsity import remove_unused_channels

ACTIVATIONS = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Identity())


def chain_of(*channels, padding=1, activation=None, bias=True, padding_mode="zeros"):
    """Convolutions of 3 x 3 with an activation behind each."""
    torch.manual_seed(0)
    modules = []
    for inputs, outputs in pairwise(channels):
        conv = nn.Conv2d(inputs, outputs, 3, padding=padding, bias=bias, padding_mode=padding_mode)
        modules += [conv, activation or nn.ReLU()]
    with torch.no_grad():
        for p in (p for m in modules for p in m.parameters()):
            p.copy_(torch.randn_like(p).abs() * 0.5 * torch.randn_like(p).sign() + 0.01)
            if p.ndim == 1:
                p.abs_()  # through a ReLU, a constant that is not 0
    return nn.Sequential(*modules)


def assert_same(smaller, chain, dtype=torch.float64):
    images = torch.randn(2, chain[0].in_channels, 12, 11, dtype=dtype)
    with torch.no_grad():
        expected = copy.deepcopy(chain).to(dtype)(images)
        assert_close(smaller.to(dtype)(images), expected, rtol=0, atol=1e-6 * float(expected.abs().max() + 1))


def widths(chain):
    return [m.out_channels for m in chain if isinstance(m, nn.Conv2d)]


def clear(conv, rows=(), columns=(), biases=()):
    with torch.no_grad():
        conv.weight[list(rows)] = 0
        conv.weight[:, list(columns)] = 0
        conv.bias[list(biases)] = 0


@given(
    rows=st.sets(st.integers(0, 5)),
    biases=st.sets(st.integers(0, 5)),
    columns=st.sets(st.integers(0, 5)),
    padding=st.sampled_from((0, 1)),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_dead_channels_leave_and_no_others(rows, biases, columns, padding, activation):
    chain = chain_of(3, 6, 4, padding=padding, activation=activation)
    clear(chain[0], rows=rows, biases=biases)
    clear(chain[2], columns=columns)
    dead = columns | (rows & biases if padding else rows)
    before = copy.deepcopy(chain.state_dict())
    smaller = remove_unused_channels(chain)
    assert widths(smaller) == [max(6 - len(dead), 1), 4]
    assert smaller[2].in_channels == smaller[0].out_channels == smaller[2].weight.shape[1]
    assert_same(smaller, chain)
    assert widths(remove_unused_channels(smaller)) == widths(smaller)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), chain.state_dict().values(), strict=True))


def test_a_chain_of_deaths():
    """What only a dead channel reads is dead, and so is what only dead channels write."""
    chain = chain_of(3, 6, 6, 6, 2, padding=0)
    clear(chain[6], columns=[4])
    with torch.no_grad():
        chain[4].weight[torch.arange(6) != 4, 2] = 0  # of conv 3, channel 2 of conv 2 is read by row 4 alone
        chain[2].weight[1, torch.arange(6) != 3] = 0  # row 1 of conv 2 reads channel 3 alone,
    clear(chain[0], rows=[3])  # which is a constant
    smaller = remove_unused_channels(chain)
    assert widths(smaller) == [5, 4, 5, 2]
    assert_same(smaller, chain)


@pytest.mark.parametrize("mode", ["replicate", "circular"])
def test_a_border_that_repeats_the_constant_does_not_show_it(mode):
    chain = chain_of(3, 6, 4, padding_mode=mode)
    clear(chain[0], rows=[0, 1])
    smaller = remove_unused_channels(chain)
    assert widths(smaller) == [4, 4]
    assert_same(smaller, chain)


def test_a_constant_stays_without_a_bias_to_take_it():
    chain = chain_of(3, 6, 4, padding=0)
    clear(chain[0], rows=[0, 1], biases=[1])
    chain[2].bias = None
    smaller = remove_unused_channels(chain)
    assert widths(smaller) == [5, 4]
    assert_same(smaller, chain)


@pytest.mark.parametrize("between", [nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Softmax(1)], ids=lambda m: type(m).__name__)
def test_what_is_not_elementwise_separates(between):
    chain = chain_of(3, 6, 4, padding=0)
    chain[1] = between
    chain.eval()
    clear(chain[2], columns=[0, 1])
    assert widths(remove_unused_channels(chain)) == [6, 4]


def test_groups_stay():
    chain = chain_of(3, 6, 4)
    chain[2] = nn.Conv2d(6, 4, 3, groups=2)
    clear(chain[0], rows=[0], biases=[0])
    assert widths(remove_unused_channels(chain)) == [6, 4]


def test_one_convolution_is_refused(refused):
    with refused("two convolutions"):
        remove_unused_channels(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
