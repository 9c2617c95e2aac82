"""Ways to a structure: penalties against autograd, ADMM to its target, training that keeps masks and values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from backbones import Backbone, dense
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from sidt.importance.criteria import magnitude
from sidt.space.space import space_for
from sidt.sparsity.admm import Admm, parts_of, train_by_admm
from sidt.sparsity.holding import hold, project
from sidt.sparsity.lines import COLUMNS, ROWS, NormConfig, learn_norms, line_lasso, small_lines
from sidt.sparsity.patterns import Kernels, Largest
from sidt.sparsity.penalties import clipped, group_lasso, hoyer_square
from sidt.sparsity.structures import Structure
from sidt.sparsity.tiles import Tiles
from sidt.sparsity.units import unit_norms, zero_units
from sidt.sparsity.values import Floats, Levels, Ternary
from sidt.training.loop import TrainConfig, fit

VIT = Backbone("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2})
seeds = st.integers(0, 2**16)


def weight_of(seed):
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradient(penalty, weight, tiles):
    (found,) = torch.autograd.grad(penalty([tiles.norms(weight)]), weight)
    return found


@given(seeds)
def test_hoyers_square(seed):
    """Gradient ``2 (S/Q) W_g/|W_g| - 2 (S/Q)^2 W_g``; no change by scale; between 1 and the number of groups."""
    weight, tiles = weight_of(seed), Tiles(2, 4)
    norms = tiles.norms(weight).detach()
    s, q = norms.sum(), weight.detach().square().sum()
    wide = tiles.spread(norms, weight)
    found = gradient(hoyer_square, weight, tiles)
    assert_close(found, (2 * (s / q) / wide - 2 * (s / q) ** 2) * weight.detach())
    value = hoyer_square([norms])
    assert_close(value, s**2 / q)
    assert_close(hoyer_square([3.7 * norms]), value)
    assert_close((found * weight.detach()).sum(), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    assert 1 <= value <= norms.numel() + 1e-9


@given(seeds, st.floats(0.2, 2.0))
def test_a_clipped_penalty_leaves_large_groups_alone(seed, eta):
    weight, tiles = weight_of(seed), Tiles(1, 4)
    norms = tiles.norms(weight).detach()
    found = gradient(lambda n: clipped(n, eta), weight, tiles)
    small = tiles.spread((norms < eta * norms.mean()).double(), weight)
    assert_close(found, small * weight.detach() / tiles.spread(norms, weight))


def test_norms_of_zero_have_no_gradient():
    weight = torch.zeros(4, 8, requires_grad=True)
    for penalty in (group_lasso, hoyer_square, lambda n: clipped(n, 1.0)):
        assert torch.equal(gradient(penalty, weight, Tiles(1, 4)), torch.zeros(4, 8))


@given(seeds)
def test_group_lasso(seed):
    weight = weight_of(seed)
    assert_close(gradient(group_lasso, weight, Tiles(1, None)), F.normalize(weight.detach(), dim=1))


def test_units_norms_are_those_of_magnitude_and_zero_units_are_gone():
    model, space = dense(VIT)
    model = copy.deepcopy(model)
    norms, scores = unit_norms(model, space), magnitude(model, p=2, space=space).scores
    assert {space.dimensions[n].kind for n in norms} == {"heads", "qk", "v", "mlp"}
    for name, found in norms.items():
        assert_close(found.detach().numpy(), scores[name])
    torch.stack([n.sum() for n in norms.values()]).sum().backward()
    assert model.blocks[1].mlp.fc1.weight.grad.abs().min() > 0
    dropped = {name: torch.zeros_like(n, dtype=torch.bool) for name, n in norms.items()}
    dropped["hidden.1"][[3, 5]] = True
    dropped["v.0"][1, 2] = True
    zero_units(model, space, dropped)
    assert not model.blocks[1].mlp.fc1.weight[[3, 5]].any() and not model.blocks[1].mlp.fc1.bias[[3, 5]].any()
    assert not model.blocks[1].mlp.fc2.weight[:, [3, 5]].any()
    assert (
        not model.blocks[0].attn.proj.weight[:, 12 + 2].any() and not model.blocks[0].attn.qkv.weight[48 + 12 + 2].any()
    )
    for name, found in unit_norms(model, space).items():
        assert torch.equal(found == 0, dropped[name]), name


STRUCTURES = [
    Structure((Largest(Tiles(1, 4), 0.5),)),
    Structure((Largest(Tiles(2, 4), 0.5),), Levels(4)),
    Structure((), Ternary(0.05)),
]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_admm_comes_to_the_structure(structure):
    """On a quadratic loss, exactly solved each round, W comes to a feasible weight."""
    torch.manual_seed(0)
    model, target = nn.Linear(8, 4, bias=False), torch.randn(4, 8)
    model.weight.data = target.clone()
    admm = Admm(model, {"weight": structure}, rho=0.5)
    for _ in range(60):
        optimizer = torch.optim.LBFGS([model.weight], line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model.weight - target).square().sum() + admm.penalty()
            loss.backward()
            return loss

        optimizer.step(closure)
        admm.update()
        admm.strengthen(1.1)
    assert admm.distance() < 0.1
    project(model, {"weight": structure})
    gap = (model.weight - target).norm() - (structure.project(target) - target).norm()
    # Several pulls at once, each to its own nearest, do not end at what is nearest for all.
    assert gap < (0.05 if len(parts_of(structure)) == 1 else 0.2) * target.norm()


def test_a_stronger_pull_leaves_the_dual_as_it_is():
    """Where W is at its target, the pull is the dual, ``rho U``, whatever rho is."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    admm = Admm(layer, {"weight": STRUCTURES[0]}, rho=0.5)
    admm.update()
    layer.weight.data = admm.state()["target.0.weight"].clone()
    (before,) = torch.autograd.grad(admm.penalty(), layer.weight)
    admm.strengthen(3.0)
    (after,) = torch.autograd.grad(admm.penalty(), layer.weight)
    assert admm.rho == 1.5 and before.any()
    assert_close(after, before)


def test_each_pattern_and_the_values_have_a_pair_of_their_own():
    both = Structure((Kernels(8), Largest(Tiles(1, 1), 0.5)), Levels(8))
    assert parts_of(both) == [
        Structure((Kernels(8),)),
        Structure((Largest(Tiles(1, 1), 0.5),)),
        Structure((), Levels(8)),
    ]
    assert parts_of(Structure()) == [Structure()]


def test_admm_goes_on_from_its_file(tmp_path, refused):
    torch.manual_seed(0)
    start, target = nn.Linear(8, 4), torch.randn(4, 8)
    structures, told = {"weight": STRUCTURES[0]}, []

    def run(model, rounds, file, stop=99):
        def train(pull, round_):
            if round_ == stop:
                raise KeyboardInterrupt
            for _ in range(20):
                model.zero_grad()
                ((model.weight - target).square().sum() + pull()).backward()
                with torch.no_grad():
                    model.weight -= 0.05 * model.weight.grad

        train_by_admm(model, structures, train, rounds=rounds, rho=0.1, growth=2.0, file=file, say=told.append)
        return model.weight.detach()

    whole = run(copy.deepcopy(start), 4, None)
    file, model = tmp_path / "admm.safetensors", copy.deepcopy(start)
    with pytest.raises(KeyboardInterrupt):
        run(model, 4, file, stop=2)
    told.clear()
    assert torch.equal(run(copy.deepcopy(start), 4, file), whole)
    assert [line.split(":")[0] for line in told] == ["round 3 of 4", "round 4 of 4"]
    file.write_bytes(file.read_bytes()[:100])
    with refused(file, "delete it"):
        run(copy.deepcopy(start), 4, file)


class Sorting:
    """Images whose label is which half is brighter."""

    classes = ("left", "right")

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(64, 3, 16, 16, generator=generator)
        self.data = TensorDataset(images, (images[..., :8].mean((1, 2, 3)) > images[..., 8:].mean((1, 2, 3))).long())

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def small():
    torch.manual_seed(0)
    return VIT.create(**VIT.kwargs, num_classes=2)


@pytest.mark.parametrize("values", [Floats(), Ternary(0.05), Levels(4)])
@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_training_keeps_masks_and_values(values, opt):
    model, structure = small(), Structure((Largest(Tiles(1, 4), 0.5),), values)
    structures = {f"blocks.{i}.mlp.{fc}.weight": structure for i in range(2) for fc in ("fc1", "fc2")}
    masks = {name: structure.mask(model.get_parameter(name)) for name in structures}
    before = {name: model.get_parameter(name).detach().clone() for name in structures}
    names = list(model.state_dict())
    held = hold(model, structures)
    seen = model(torch.zeros(1, 3, 16, 16))
    assert list(model.state_dict()) == names
    fit(model, Sorting(), TrainConfig(epochs=1, batch_size=32, lr=1e-2, opt=opt, device="cpu"))
    outputs = model.eval()(torch.zeros(1, 3, 16, 16))
    held.remove(keep=True)
    assert_close(model(torch.zeros(1, 3, 16, 16)), outputs)
    assert not torch.equal(outputs, seen)
    for name in structures:
        weight = model.get_parameter(name).detach()
        assert type(weight) is torch.Tensor and not weight[~masks[name]].any()
        assert torch.equal(structure.rounded(weight, masks[name]), weight)
        assert not torch.equal(weight, structure.project(before[name]))


def test_a_ternary_gradient_goes_straight_through_where_it_may():
    layer = nn.Linear(6, 2, bias=False)
    layer.weight.data = torch.tensor([[0.5, -0.01, 2.0, -1.0, 0.9, 0.3], [0.2, 0.4, -3.0, 0.6, 0.7, 0.1]])
    structure = Structure((Largest(Tiles(1, 3), 0.75),), Ternary(0.05))
    mask = structure.mask(layer.weight)
    hold(layer, {"weight": structure})
    layer(torch.ones(1, 6)).sum().backward()
    weight = layer._parameters["weight"]
    assert torch.equal(weight.grad != 0, mask & (weight.abs() < 1))


def test_lines_that_are_next_to_nothing_are_found():
    layer = nn.Sequential(nn.Linear(8, 4))
    layer[0].weight.data = torch.ones(4, 8)
    layer[0].weight.data[0] *= 1e-3
    layer[0].weight.data[:, :4] *= 1e-3
    found = small_lines(layer, ["0.weight"], 0.1)
    assert found == {"0.weight": (0.25, 0.5)}
    expected = ROWS.norms(layer[0].weight).sum() + COLUMNS.norms(layer[0].weight).sum()
    assert_close(line_lasso(layer, ["0.weight"]), expected)


def test_learned_norms_are_an_importance():
    model = small()
    config = NormConfig(epochs=3, batch_size=32, lr=5e-3, strength=1e-2, device="cpu")
    found = learn_norms(model, Sorting(), config)
    space = space_for(model)
    before, after = (unit_norms(m, space) for m in (model, found.model))

    def spread(norms):
        return float(hoyer_square([norms[n].detach() for n in ("hidden.0", "hidden.1")]))

    assert spread(after) < 0.9 * spread(before)
    assert_close(found.importance.scores["hidden.0"], after["hidden.0"].detach().numpy())
    assert (found.importance.scores["embed"] == 1).all()
    assert torch.equal(model.blocks[0].mlp.fc1.weight, small().blocks[0].mlp.fc1.weight)
