"""The benchmark's own CORP and VBP do what their formulas say, on models that are small enough to know the answer."""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import timm
import torch
import training_free
from backbones import shake
from cells import RivalError, Setting
from sklearn.covariance import OAS
from torch import nn
from torch.testing import assert_close
from training_free import corp, vbp

from sidt.data.loading import Splits
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.moments import measure_moments
from sidt.surgery.slicing import slice_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IMAGES = 12
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2)},
    ),
}


@cache
def made(name: str) -> nn.Module:
    """A model of random weights, in eval mode; tests copy it before they change it."""
    torch.manual_seed(0)
    architecture, sizes = MODELS[name]
    return shake(timm.create_model(architecture, num_classes=5, **sizes)).eval()


@pytest.fixture(params=MODELS)
def model(request):
    """A copy of its own."""
    return copy.deepcopy(made(request.param))


def setting_of(model, tmp_path, share=0.7, kind="params"):
    space = space_for(model)
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(*space.trace.input_size, generator=generator), 0) for _ in range(IMAGES)]
    return Setting(model, space, Splits(*[data] * 5, ("only",)), kind, share, 0, IMAGES, tmp_path)


def outputs(model, setting):
    with torch.no_grad():
        return torch.cat([model(images) for images, _ in setting.calibration()])


def distance(model, setting):
    return float((outputs(model, setting) - outputs(setting.dense, setting)).norm())


# --- VBP --------------------------------------------------------------------------------------------------------------


def test_vbp_prunes_constant_units_of_all_layers_first_and_loses_nothing(model, tmp_path):
    setting = setting_of(model, tmp_path)
    constant = {}
    for number, (name, reader) in enumerate(training_free.mlps(setting.space).items()):
        block, constant[name] = model.get_submodule(reader.removesuffix(".mlp.fc2.weight")), 3 + number
        fc1 = block.mlp.fc1
        with torch.no_grad():
            for shift in (block.norm2.bias, fc1.bias):
                shift.zero_()  # no other unit is nearly constant, as those are that lie far below 0
            fc1.weight[3 + number], fc1.bias[3 + number] = 0, 0.25  # GELU of it is not 0
    sizes = {name: setting.space.sizes[name] - 1 for name in constant}
    without = slice_model(model, DimensionPlan(setting.space, {n: np.arange(s) for n, s in sizes.items()}))
    setting = replace(setting, share=setting.cost(without) / setting.cost(model))
    small, info = vbp(setting)
    assert info["dropped"] == len(constant)
    for name, unit in constant.items():
        assert small.sidt_plan.keep[name].tolist() == [u for u in range(setting.space.sizes[name]) if u != unit]
    assert distance(small, setting) < 1e-4
    assert distance(slice_model(model, small.sidt_plan), setting) > 1e-2  # it is the means that make up for it


def test_vbp_ranks_all_layers_together_and_leaves_each_its_best_unit():
    steps, keep = training_free.by_variance({"a": np.array([2.0, 1.0, 3.0]), "b": np.array([9.0, 0.5])})
    assert steps == 3
    kept = [{name: sorted(units.tolist()) for name, units in keep(step).items()} for step in range(4)]
    assert kept == [
        {"a": [0, 1, 2], "b": [0, 1]},
        {"a": [0, 1, 2], "b": [0]},
        {"a": [0, 2], "b": [0]},
        {"a": [2], "b": [0]},
    ]


# --- CORP's MLPs ------------------------------------------------------------------------------------------------------


def test_units_that_depend_on_the_kept_ones_are_predicted():
    kept, pruned, samples = np.array([0, 2, 5]), [1, 3, 4], 200
    x = torch.empty(samples, 6, dtype=torch.float64)
    x[:, kept] = 100 * torch.randn(samples, 3, dtype=torch.float64) + 50  # so large that the ridge is nothing beside it
    x[:, pruned] = x[:, kept] @ torch.randn(3, 3, dtype=torch.float64) + 7
    share = training_free.prediction(torch.cov(x.T, correction=0), kept, samples=10**9)
    model = nn.ModuleDict({"fc2": nn.Linear(6, 4)}).double()
    expected = model["fc2"](x)
    training_free.fold(model, "fc2.weight", kept, x.mean(0), share)
    weight, bias = model["fc2"].weight, model["fc2"].bias
    assert_close(x[:, kept] @ weight[:, kept].T + bias, expected, rtol=1e-5, atol=1e-4)


def test_prediction_solves_its_ridge_regression():
    kept, x = np.array([1, 2, 4]), torch.randn(30, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    covariance = torch.cov(x.T, correction=0)
    share = training_free.prediction(covariance, kept, samples=30)
    within = covariance[kept][:, kept]
    ridge = training_free.oas(within, 30) * within.trace() / 3
    assert ridge > training_free.RIDGE
    assert_close(share @ (within + ridge * torch.eye(3)), covariance[[0, 3]][:, kept], rtol=1e-8, atol=1e-8)
    tiny = 1e-6 * covariance  # here the least ridge holds
    share = training_free.prediction(tiny, kept, samples=30)
    assert_close(share @ (tiny[kept][:, kept] + 1e-3 * torch.eye(3)), tiny[[0, 3]][:, kept], rtol=1e-8, atol=1e-12)


def test_oas_is_that_of_its_paper():
    assert training_free.oas(torch.diag(torch.tensor([1.0, 0.0])), 8) == pytest.approx(0.25)  # by hand
    assert training_free.oas(3 * torch.eye(4), 100) == 1
    x = torch.randn(60, 40, dtype=torch.float64) @ torch.randn(40, 40, dtype=torch.float64)
    size, matrix = 40, torch.cov(x.T, correction=0)
    square, trace = (matrix @ matrix).trace(), matrix.trace()
    above = (1 - 2 / size) * square + trace**2
    rho = training_free.oas(matrix, 60)
    assert rho == pytest.approx(float(above / ((60 + 1 - 2 / size) * (square - trace**2 / size))))
    assert rho == pytest.approx(OAS().fit(x.numpy()).shrinkage_, rel=2 / size)  # scikit-learn leaves the 2 / p out


def test_activity_is_the_share_of_positions_above_zero(model, tmp_path):
    setting, seen = setting_of(model, tmp_path), {}
    for reader in training_free.mlps(setting.space).values():
        layer = model.get_submodule(reader.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _, x, reader=reader: seen.setdefault(reader, []).append(x[0]))
    outputs(model, setting)
    read = {name: torch.cat(each).flatten(0, -2) for name, each in seen.items()}
    active, positions = training_free.activity(setting)
    assert positions == {name: len(x) for name, x in read.items()}
    for name, x in read.items():
        assert_close(active[name], (x > 0).double().mean(0))
        assert float(active[name].min()) < 0.5 < float(active[name].max())


# --- CORP's q/k -------------------------------------------------------------------------------------------------------


def test_solve_satisfies_its_equation():
    left, right = (a @ a.T for a in torch.randn(2, 6, 9, dtype=torch.float64))
    cross, ridge = torch.randn(6, 6, dtype=torch.float64), 0.3
    found = training_free.solve(left, right, cross, ridge)
    assert_close(left @ found @ right + ridge * found, cross, rtol=0, atol=1e-8)


def test_lost_logits_are_the_least_squares_over_all_pairs():
    q, k = torch.randn(20, 5, dtype=torch.float64), torch.randn(15, 5, dtype=torch.float64) + 0.5
    kept, pruned = np.array([0, 3]), [1, 2, 4]
    found = training_free.lost_logits(q.T @ q / 20, k.T @ k / 15, kept)
    pairs = torch.kron(q[:, kept].contiguous(), k[:, kept].contiguous())  # [20 * 15, 2 * 2]
    wanted = (q[:, pruned] @ k[:, pruned].T).reshape(-1, 1)
    assert_close(found, torch.linalg.lstsq(pairs, wanted).solution.view(2, 2), rtol=1e-4, atol=1e-4)


def test_logit_moments_are_those_of_the_q_and_k_that_the_model_computes(model, tmp_path):
    setting, written = setting_of(model, tmp_path), {}
    for heads, owner in setting.space.attention.items():
        layer, name = model.get_submodule(owner).qkv, heads.replace("heads", "qk")
        layer.register_forward_hook(lambda _, __, y, name=name: written.setdefault(name, []).append(y))
    outputs(model, setting)
    seen = {name: torch.cat(each).flatten(0, -2).double() for name, each in written.items()}
    found = training_free.logit_moments(model, measure_moments(model, setting.calibration(), space=setting.space))
    assert set(found) == set(seen)
    for name, pair in found.items():
        for moment, values in zip(pair, seen[name].chunk(3, dim=1), strict=False):  # q, k, and v
            per_head = values.view(len(values), 2, -1)
            expected = torch.einsum("nhi,nhj->hij", per_head, per_head) / len(values)
            assert_close(moment, expected, rtol=1e-4, atol=1e-4)


def test_dependent_q_and_k_keep_their_logits(model, tmp_path):
    setting = setting_of(model, tmp_path)
    space, keep = setting.space, {}
    for name in training_free.attentions(model, space):
        (heads, size), rng = (2, space.sizes[name]), np.random.default_rng(0)
        keep[name] = np.sort(np.stack([rng.permutation(size)[: size // 2] for _ in range(heads)]))
        weights, biases = training_free.writers(space, name)
        assert len(weights) == len(biases) == 2
        for head, kept in enumerate(keep[name]):
            pruned = training_free.others(kept, size)
            for pair in zip(weights, biases, strict=True):
                change = 0.5 * torch.randn(len(pruned), len(kept))
                for stretch in pair:
                    units = training_free.per_head(model, stretch, space, name)[head]
                    units[pruned] = change @ units[kept]
    moments, changed = measure_moments(model, setting.calibration(), space=space), copy.deepcopy(model)
    for name, (q, k) in training_free.logit_moments(model, moments).items():
        training_free.compensate_logits(changed, space, name, keep[name], q, k)
    plan = DimensionPlan(space, keep)
    assert_close(outputs(slice_model(changed, plan), setting), outputs(model, setting), rtol=1e-3, atol=1e-3)
    assert distance(slice_model(model, plan), setting) > 0.1


def test_corp_is_nearer_than_its_plain_slice_and_shrinks_all_layers_alike(model, tmp_path):
    setting = setting_of(model, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, info = corp(setting)
    plan = small.sidt_plan
    assert distance(small, setting) < 0.9 * distance(slice_model(model, plan), setting)
    for name, dimension in setting.space.dimensions.items():
        ratio = info["ratio"] if dimension.kind in ("mlp", "qk") else 1
        assert plan.sizes[name] == max(1, int(ratio * dimension.size)), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("method", [corp, vbp])
def test_the_target_is_met_from_below(model, tmp_path, method, kind):
    setting = setting_of(model, tmp_path, 0.7, kind)
    small, _ = method(setting)
    assert 0.95 * setting.limit <= setting.cost(small) <= setting.limit


@pytest.mark.parametrize(("method", "kinds"), [(corp, {"mlp", "qk"}), (vbp, {"mlp"})])
def test_a_target_out_of_reach_names_the_smallest_share(model, tmp_path, method, kinds):
    setting = setting_of(model, tmp_path, 0.1)
    first = {
        d.name: np.zeros((2, 1) if d.per else 1, dtype=int)
        for d in setting.space.dimensions.values()
        if d.kind in kinds
    }
    share = setting.cost(slice_model(model, DimensionPlan(setting.space, first))) / setting.cost(model)
    with pytest.raises(RivalError, match=f"{share:.2%} of the params"):
        method(setting)
    assert setting.cost(method(replace(setting, share=share))[0]) <= share * setting.cost(model) + 1
