"""Optimal Brain Surgeon on tiles: each cost against the refit that it stands for, and what is left of a whole model."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sidt.importance.unlabelled import own_outputs
from sidt.sparsity.patterns import Largest, OfEvery
from sidt.sparsity.refitting import input_moments, refit
from sidt.sparsity.structures import Structure
from sidt.sparsity.surgeon import emptied_rows, output_fisher, surgeon_masks
from sidt.sparsity.tiles import Tiles


def case(outputs=8, inputs=12, *, bias=True, seed=0):
    """A linear layer, what it reads, [40, inputs], and the Fisher information of its outputs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = nn.Linear(inputs, outputs, bias=bias).double()
    with torch.no_grad():
        layer.weight.copy_(random(outputs, inputs))
        if bias:
            layer.bias.copy_(random(outputs))
    x = random(40, inputs) @ random(inputs, inputs) + 0.5
    return nn.Sequential(layer), x, random(outputs).square()


def moments_of(model, x):
    return input_moments(model, ["0.weight"], [(x, None)])["0.weight"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [Tiles(2, 3), Tiles(4, 1), Tiles(1, 4), Tiles(3, 5, ragged=True), Tiles(None, 2)])
def test_the_costs_are_what_the_refit_loses(tiles, bias, monkeypatch):
    monkeypatch.setattr("sidt.sparsity.surgeon._RIDGE", 1e-6)  # the refit's
    model, x, fisher = case(bias=bias)
    layer, whole = model[0], model(x).detach()
    own = layer.bias.detach() if bias else None
    costs, order = emptied_rows(layer.weight.detach(), own, moments_of(model, x), fisher, tiles)
    down, across = order.shape
    assert all(sorted(row) == list(range(across)) for row in order.tolist())
    for gone in range(1, across):
        kept = torch.ones(down, across, dtype=torch.bool).scatter_(1, order[:, :gone], torch.zeros_like(order).bool())
        twin = copy.deepcopy(model)
        refit(twin, {"0.weight": tiles.spread(kept, layer.weight)}, {"0.weight": moments_of(model, x)})
        lost = (((twin(x) - whole).square().mean(0)) * fisher).sum()
        assert_close(costs[:, :gone].sum(), lost.detach(), rtol=1e-3, atol=1e-3)  # but for the ridge


def test_the_first_to_go_is_the_cheapest_of_all():
    model, x, fisher = case(outputs=2)
    layer, whole, tiles = model[0], model(x).detach(), Tiles(2, 3)
    moments = moments_of(model, x)
    costs, order = emptied_rows(layer.weight.detach(), layer.bias.detach(), moments, fisher, tiles)
    lost = []
    for tile in range(4):
        twin, kept = copy.deepcopy(model), torch.ones(1, 4, dtype=torch.bool)
        kept[0, tile] = False
        refit(twin, {"0.weight": tiles.spread(kept, layer.weight)}, {"0.weight": moments})
        lost.append(float(((twin(x) - whole).square().mean(0) * fisher).sum().detach()))
    assert lost[order[0, 0]] == min(lost)
    assert_close(float(costs[0, 0]), min(lost), rtol=2e-2, atol=1e-3)


def test_work_in_parts_is_the_same(monkeypatch):
    model, x, fisher = case()
    given = (model[0].weight.detach(), model[0].bias.detach(), moments_of(model, x), fisher, Tiles(1, 2))
    whole = emptied_rows(*given)
    monkeypatch.setattr("sidt.sparsity.surgeon._BYTES", 3 * 13**2 * 8)
    for mine, all_of_it in zip(emptied_rows(*given), whole, strict=True):
        assert_close(mine, all_of_it)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))


def test_the_share_is_of_all_weights_together_and_fewer_tiles_are_among_more():
    model, x = network(), torch.randn(64, 12)
    names = ["0.weight", "2.weight"]
    moments = input_moments(model, names, [(x, None)])
    fisher = output_fisher(model, names, [(x, None)], own_outputs(features=False))
    fisher["0.weight"] *= 100.0
    kept = {}
    for share in (0.25, 0.5):
        structures = dict.fromkeys(names, Structure((Largest(Tiles(4, 4), share),)))
        masks = kept[share] = surgeon_masks(model, structures, moments, fisher)
        assert sum(int(mask.sum()) for mask in masks.values()) == share * (12 * 16 + 16 * 8)
        shares = [float(masks[name].float().mean()) for name in names]
        assert shares[0] > share > shares[1]
    assert not any((kept[0.25][name] & ~kept[0.5][name]).any() for name in names)


def test_fisher_is_the_mean_square_of_each_images_gradient():
    model, x = network(), torch.randn(6, 12)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def loss(net, batch):
        return net(batch[0]).square().sum(1).mean()

    found = output_fisher(model, ["2.weight"], [(x[:4], None), (x[4:], None)], loss)["2.weight"]
    hidden = model[:3](x).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model[3:](hidden).square().sum(), hidden)
    assert_close(found, gradient.double().square().mean(0), rtol=1e-4, atol=1e-9)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_mistakes(refused):
    model, x = network(), torch.randn(8, 12)
    one = Structure((Largest(Tiles(4, 4), 0.5),))
    with refused("one pattern", "0.weight"):
        surgeon_masks(model, {"0.weight": Structure((OfEvery(2, 4),))}, {}, {})
    with refused("linear layers", "0.weight"):
        surgeon_masks(nn.Sequential(nn.Conv2d(4, 4, 1)), {"0.weight": one}, {}, {})
    with refused("0.weight", "no image went through"):
        surgeon_masks(model, {"0.weight": one}, {}, {})
    with refused("no calibration image"):
        output_fisher(model, ["0.weight"], [], own_outputs(features=False))
    with refused("the loss is nan"):
        output_fisher(model, ["0.weight"], [(x * torch.nan, None)], lambda net, batch: net(batch[0]).mean())
