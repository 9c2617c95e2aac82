"""Least squares of what a mask leaves: against a solver of the whole problem, and never worse than the mask."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sidt.sparsity.patterns import Largest, OfEvery
from sidt.sparsity.refitting import input_moments, input_scale, refit
from sidt.sparsity.structures import Structure
from sidt.sparsity.tiles import Tiles


def case(*, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=bias)).double()
    images = torch.randn(40, 3, 2, 2, dtype=torch.float64) @ torch.randn(2, 2, dtype=torch.float64) + 0.3
    return model, images


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pattern", [Largest(Tiles(2, 3), 0.5), OfEvery(2, 4), Largest(Tiles(1, 1), 0.3)])
def test_it_is_the_least_squares_fit(pattern, bias):
    model, images = case(bias=bias)
    whole = model(images).detach()
    weight = model[1].weight
    mask = Structure((pattern,)).mask(weight)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked[1].weight.mul_(mask)
    moments = input_moments(model, ["1.weight"], [(images[:30], None), (images[30:], None)])
    refit(model, {"1.weight": mask}, moments)
    assert not model[1].weight[~mask].any()
    assert (model(images) - whole).square().sum() <= (masked(images) - whole).square().sum()
    inputs = torch.cat([images.flatten(1), torch.ones(40, 1, dtype=torch.float64)], 1)
    for row in range(8):
        kept = torch.cat([mask[row], torch.tensor([bias])])
        best = torch.linalg.lstsq(inputs[:, kept], whole[:, row : row + 1]).solution
        mine = torch.cat([model[1].weight[row], (model[1].bias[row] if bias else torch.zeros(())).reshape(1)])[kept]
        assert_close(mine.detach(), best[:, 0], atol=1e-3, rtol=1e-3)


def test_with_everything_kept_nothing_changes():
    model, images = case()
    before = copy.deepcopy(model)
    moments = input_moments(model, ["1.weight"], [(images, None)])
    refit(model, {"1.weight": torch.ones(8, 12, dtype=torch.bool)}, moments)
    assert torch.equal(model(images), before(images))
    assert_close(input_scale(moments["1.weight"]), images.flatten(1).square().mean(0).sqrt())


def test_an_output_that_keeps_nothing_is_its_mean():
    model, images = case()
    whole, mask = model(images).detach(), torch.ones(8, 12, dtype=torch.bool)
    mask[3] = False
    refit(model, {"1.weight": mask}, input_moments(model, ["1.weight"], [(images, None)]))
    assert not model[1].weight[3].any()
    assert_close(model[1].bias[3].detach(), whole[:, 3].mean(), atol=1e-5, rtol=1e-4)


def test_convolutions_are_masked_and_no_image_is_a_mistake(refused):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    moments = input_moments(model, ["0.weight", "2.weight"], [(torch.randn(4, 3, 2, 2), None)])
    assert set(moments) == {"2.weight"}
    mask = torch.rand(4, 3, 1, 1) > 0.5
    expected = model[0].weight.detach() * mask
    refit(model, {"0.weight": mask}, moments)
    assert torch.equal(model[0].weight.detach(), expected)
    with refused("no calibration image"):
        input_moments(model, ["2.weight"], [])
