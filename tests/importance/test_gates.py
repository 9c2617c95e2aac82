"""Learned gates: what must hold for any backbone and placement, and what a short training makes of them."""

import copy

import numpy as np
import pytest
import timm
import torch
from backbones import BACKBONES, PVT, VIT_TINY, dense, random_plan
from timm.optim import create_optimizer_v2
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from sidt.export.checkpoint import load
from sidt.importance.gates import GateConfig, gated, learn_gates
from sidt.importance.scores import load_importance
from sidt.runs import pipeline
from sidt.runs.folder import open_run
from sidt.space.families import INNER_KINDS, KINDS
from sidt.space.outputs import tensors_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.slicing import mask_model, slice_model

PLACEMENTS = ("sidt", "vtp", "vit-slim")


@pytest.fixture(scope="module", params=BACKBONES, ids=str)
def backbone(request):
    return request.param


def outputs(model, images):
    found = model(images)
    return tuple(tensors_of(found))


@torch.no_grad()
def run(model, images):
    return outputs(model, images)


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def close(some, others):
    for found, wanted in zip(some, others, strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def with_gates(backbone, placement="sidt", kinds=KINDS, **options):
    model, space = dense(backbone)
    if placement == "vit-slim" and apart(space):
        pytest.skip("q and k of another size than v share no gate with it")
    model = copy.deepcopy(model)
    return model, gated(model, space, placement=placement, kinds=kinds, **options)


def apart(space):
    """Whether q and k have another size than v, as in differential attention."""
    return any(n.startswith("qk.") and size != space.sizes[f"v.{n[3:]}"] for n, size in space.sizes.items())


def shaken(gates):
    """The gates at random values, some of them negative."""
    with torch.no_grad():
        for parameter in gates.gates.values():
            parameter.copy_(torch.rand_like(parameter) * 2 - 0.5)
    return gates


def anatomy(model):
    """Everything that gating may touch."""
    parts = {
        name: (type(module), sorted(set(module.__dict__) - {"_is_accelerate_prepared"}), list(module._modules))
        for name, module in model.named_modules()
    }
    return parts, list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}


# --- any backbone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gates_of_one_change_nothing(backbone, placement):
    model, _ = dense(backbone)
    gated_model, gates = with_gates(backbone, placement)
    assert gates.gates and all(value.eq(1).all() for value in gates.values().values())
    # A convolution may take another kernel for a weight that was computed.
    close(run(gated_model, backbone.images()), run(model, backbone.images()))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gated_is_folded(backbone, placement):
    model, gates = with_gates(backbone, placement)
    before = run(model, backbone.images())
    expected = run(shaken(gates).model, backbone.images())
    assert not same(before, expected)
    gates.remove(fold=True)
    close(run(model, backbone.images()), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_removing_gates_restores_the_model(backbone, placement):
    original, space = dense(backbone)
    if placement == "vit-slim" and apart(space):
        pytest.skip("q and k of another size than v share no gate with it")
    model = copy.deepcopy(original)
    before = anatomy(model)
    gates = gated(model, space, placement=placement, kinds=KINDS)
    assert set(before[1]) < set(model.state_dict())  # every tensor keeps its name
    shaken(gates).remove(fold=False)
    assert anatomy(model) == before
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )
    assert same(run(model, backbone.images()), run(original, backbone.images()))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_reach_every_gate(backbone, placement):
    model, gates = with_gates(backbone, placement)
    sum(part.square().mean() for part in outputs(model, backbone.images())).backward()
    # Some MLP units may be where GELU is flat, and many where ReLU is, which these have.
    share = 0.5 if backbone.name.startswith(("Detr", "Mask2Former")) else 0.9
    for name, parameter in gates.gates.items():
        assert parameter.grad.isfinite().all() and parameter.grad.ne(0).float().mean() > share, name
    reached = [p for name, p in model.named_parameters() if p.grad is not None]
    learned = [p for p in dense(backbone)[0].parameters() if p.requires_grad]  # DETR freezes the start of its ResNet
    assert len(reached) >= len(learned)  # the weights learn too


def test_every_free_unit_has_its_gate(backbone):
    _, space = dense(backbone)
    _, gates = with_gates(backbone)
    assert set(gates.gates) == {d.name for d in space.dimensions.values() if not d.fixed}
    scores = shaken(gates).scores().scores
    for name, value in gates.values().items():
        assert scores[name].shape == tuple(value.shape) and len(np.unique(scores[name])) > 0.99 * value.numel()


def test_gates_of_zero_are_a_mask(backbone):
    """An independent look at where the gates stand: what they silence is what slicing removes."""
    model, space = dense(backbone)
    # Cosine attention divides k by its norm, which a gate on q does not change; nor do gates stand before inner norms.
    without = {d.kind for d in space.dimensions.values() if d.normed} | ({"qk"} if "swinv2" in backbone.name else set())
    kinds = tuple(kind for kind in INNER_KINDS if kind not in without)
    plan = random_plan(space, 0, kinds)
    gated_model, gates = with_gates(backbone, kinds=kinds)
    with torch.no_grad():
        for name, value in gates.values().items():
            mask = torch.zeros(value.shape)
            parent = space.dimensions[name].per
            rows = slice(None) if parent is None else torch.from_numpy(plan.keep[parent])[:, None]
            kept = torch.from_numpy(plan.keep[name])
            if parent is None:
                mask[kept] = 1
            else:
                mask[rows, kept] = 1
            gates.gates[name].copy_(mask.reshape(-1))
    close(run(gated_model, backbone.images()), run(mask_model(model, plan), backbone.images()))


# --- one backbone --------------------------------------------------------------------------------------------------


def test_weight_gates_are_activation_gates():
    model, _ = dense(VIT_TINY)
    gated_model, gates = with_gates(VIT_TINY, "vtp")
    shaken(gates)
    model = copy.deepcopy(model)
    for name, value in gates.values().items():
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda module, args, value=value: (args[0] * value,))
    assert_close(run(gated_model, VIT_TINY.images()), run(model, VIT_TINY.images()), rtol=1e-4, atol=1e-5)


def test_the_shared_gate_of_vit_slim_folds_to_its_square_in_q():
    original, _ = dense(VIT_TINY)
    model, gates = with_gates(VIT_TINY, "vit-slim", INNER_KINDS)
    gate = shaken(gates).values()["heads.0"].detach().reshape(-1)
    hidden = gates.values()["hidden.0"].detach()
    scores = gates.scores().scores
    gates.remove(fold=True)
    width = len(gate)
    before, after = original.blocks[0], model.blocks[0]
    assert_close(after.attn.qkv.weight[:width], before.attn.qkv.weight[:width] * gate[:, None] ** 2)
    assert_close(after.attn.qkv.bias[:width], before.attn.qkv.bias[:width] * gate**2)
    assert torch.equal(after.attn.qkv.weight[width : 2 * width], before.attn.qkv.weight[width : 2 * width])
    assert_close(after.attn.proj.weight, before.attn.proj.weight * gate)
    assert_close(after.mlp.fc2.weight, before.mlp.fc2.weight * hidden)
    np.testing.assert_allclose(scores["qk.0"].reshape(-1), gate**2, rtol=1e-6)
    np.testing.assert_allclose(scores["v.0"].reshape(-1), gate.abs(), rtol=1e-6)


def test_a_unit_scores_what_goes_with_it():
    _, gates = with_gates(VIT_TINY, kinds=INNER_KINDS)
    shaken(gates)
    values = {name: value.detach().double().abs().numpy() for name, value in gates.values().items()}
    scores = gates.scores().scores
    v = values["heads.1"][:, None] * values["v.1"]
    np.testing.assert_allclose(scores["v.1"], v, rtol=1e-6)
    np.testing.assert_allclose(scores["qk.1"], values["qk.1"], rtol=1e-6)
    np.testing.assert_allclose(scores["heads.1"], v.sum(1) + values["qk.1"].sum(1), rtol=1e-6)
    np.testing.assert_allclose(scores["hidden.1"], values["hidden.1"], rtol=1e-6)
    assert (scores["embed"] == 1).all()  # no gates
    _, gates = with_gates(VIT_TINY, "vtp")
    shaken(gates)
    values = {name: value.detach().double().abs().numpy() for name, value in gates.values().items()}
    scores = gates.scores().scores
    readers = [f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "mlp.fc1")]
    np.testing.assert_allclose(scores["embed"], sum(values[name] for name in readers), rtol=1e-6)
    proj = values["blocks.0.attn.proj.weight"].reshape(3, 64)
    np.testing.assert_allclose(scores["heads.0"], proj.sum(1), rtol=1e-6)
    np.testing.assert_allclose(scores["v.0"], proj, rtol=1e-6)
    assert (scores["qk.0"] == 1).all()


def test_the_penalty_is_its_formula():
    _, gates = with_gates(VIT_TINY, kinds=INNER_KINDS, speed=7.0)
    shaken(gates)
    sums = dict.fromkeys(KINDS, 0.0)
    for name, parameter in gates.gates.items():
        value = 1 + 7 * (parameter.detach().double() - 1)
        sums[gates.space.dimensions[name].kind] += value.abs().sum().item()
    assert gates.penalty(0.25).item() == pytest.approx(0.25 * sum(sums.values()), rel=1e-5)
    lambdas = {"heads": 0.5, "mlp": 0.125}
    assert gates.penalty(lambdas).item() == pytest.approx(0.5 * sums["heads"] + 0.125 * sums["mlp"], rel=1e-5)


def test_a_copy_has_gates_of_its_own():
    model, gates = with_gates(VIT_TINY)
    twin = copy.deepcopy(model)  # as a moving average makes one
    before = run(twin, VIT_TINY.images())
    shaken(gates)
    assert same(run(twin, VIT_TINY.images()), before) and not same(run(model, VIT_TINY.images()), before)
    twin.load_state_dict(model.state_dict())
    assert same(run(twin, VIT_TINY.images()), run(model, VIT_TINY.images()))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gates_have_no_weight_decay(placement):
    model, gates = with_gates(VIT_TINY, placement)
    groups = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.5).param_groups
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {id(p) for p in gates.gates.values()} <= spared
    assert id(model.blocks[0].mlp.fc2._parameters["weight"]) not in spared


def test_a_sliced_model_has_gates():
    model, space = dense(PVT)
    sliced = slice_model(model, random_plan(space, 1, INNER_KINDS))
    before = run(sliced, PVT.images())
    gates = gated(sliced, space_for(sliced, PVT.input_size))
    assert same(run(sliced, PVT.images()), before)
    gates.remove(fold=True)
    assert same(run(sliced, PVT.images()), before)


def test_mistakes_are_said(refused):
    model, gates = with_gates(VIT_TINY)
    with refused("gates already"):
        gated(model, gates.space)
    gates.remove(fold=False)
    with refused("vip", "vit-slim"):
        gated(model, gates.space, placement="vip")
    with refused("kinds"):
        gated(model, gates.space, kinds=())
    sliced = slice_model(model, DimensionPlan(gates.space, {"qk.0": np.tile(np.arange(8), (3, 1))}))
    with refused("vit-slim", "heads.0"):
        gated(sliced, placement="vit-slim")


# --- learning them -------------------------------------------------------------------------------------------------


class Toy(Dataset):
    """Three classes told apart by the brightest channel."""

    classes = ("red", "green", "blue")

    def __init__(self, stop_at=float("inf")):
        self.reads, self.stop_at = 0, stop_at

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > self.stop_at:
            raise KeyboardInterrupt
        image = 0.3 * torch.randn(3, 16, 16)
        image[index % 3] += 1
        return image, index % 3


def tiny():
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **options)


QUICK = {"epochs": 3, "batch_size": 8, "lr": 1e-3, "speed": 20.0, "lambdas": 1e-2, "device": "cpu"}


def test_a_dead_unit_loses_its_gate():
    model = tiny()
    with torch.no_grad():  # GELU(-30) is 0, and so is its slope
        model.blocks[0].mlp.fc1.weight[5].zero_()
        model.blocks[0].mlp.fc1.bias[5] = -30
    learned = learn_gates(model, Toy(), GateConfig(**QUICK | {"lambdas": 1e-4}))
    gates = learned.gates["hidden.0"]
    # Nothing but the penalty moves it, and always down: with Adam by nearly speed * lr in every update.
    assert gates[5] < np.delete(gates, 5).mean() - 0.02
    travel = 20 * sum(record["lr"] for record in learned.history) * 3  # updates of an epoch
    assert 1 - 3 * travel < gates[5] < 1 - travel / 3
    assert len(learned.history) == 3


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_given_model_is_left_and_the_trained_one_is_ordinary(placement):
    model = tiny().eval()
    model.blocks[1].train()
    before, state = anatomy(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learned = learn_gates(model, Toy(), GateConfig(**QUICK, placement=placement))
    assert anatomy(model) == before and not model.training and model.blocks[1].training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert anatomy(learned.model)[:2] == before[:2]
    assert not torch.equal(learned.model.blocks[0].mlp.fc2.weight, model.blocks[0].mlp.fc2.weight)
    assert learned.importance.scores["hidden.1"].std() > 0


def test_the_trained_model_is_the_gated_one():
    """With no step of the weights, folding the learned gates into the given model gives the trained one."""
    model = tiny()

    def loss(wrapped, images, targets):
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_("sidt_gates" in name)
        return nn.functional.cross_entropy(wrapped(images), targets)

    learned = learn_gates(model, Toy(), GateConfig(**QUICK, weight_decay=0), loss=loss)
    gates = gated(model)
    with torch.no_grad():
        for name, parameter in gates.gates.items():
            parameter.copy_(torch.from_numpy(learned.gates[name]).reshape(-1))
    gates.remove(fold=True)
    for name, tensor in model.state_dict().items():
        assert_close(tensor, learned.model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_an_interrupted_search_stage_goes_on(tmp_path, refused):
    config = GateConfig(**QUICK)
    whole = learn_gates(tiny(), Toy(), config, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learn_gates(tiny(), Toy(stop_at=40), config, folder=tmp_path / "cut")
    resumed = learn_gates(tiny(), Toy(), config, folder=tmp_path / "cut")
    for name, scores in whole.importance.scores.items():
        np.testing.assert_array_equal(resumed.importance.scores[name], scores)
    assert same(run(resumed.model, torch.ones(1, 3, 16, 16)), run(whole.model, torch.ones(1, 3, 16, 16)))
    with refused("lambdas"):
        learn_gates(tiny(), Toy(), GateConfig(**{**QUICK, "lambdas": 0.5}), folder=tmp_path / "cut")


def test_unknown_values_are_refused():
    for wrong in ({"placement": "vip"}, {"lambdas": {"width!": 1.0}}, {"speed": 0}, {"lambdas": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GateConfig(**{**QUICK, **wrong})
    assert GateConfig(lambdas={"mlp": 0.1}).lambdas == {"mlp": 0.1}


def test_a_run_scores_by_gates(tmp_path, refused):
    path = tmp_path / "run.yaml"
    args = "{img_size: 16, patch_size: 8, depth: 2, embed_dim: 12, num_heads: 2, num_classes: 10}"
    path.write_text(
        f"""model: {{name: vit_tiny_patch16_224, args: {args}}}
data: {{name: digits, image_size: 16}}
train: {{epochs: 1}}
repair: false
score: {{method: gates, images: 64, gates: {{epochs: 1, speed: 50}}}}
budget: {{params: 0.6}}
device: cpu
"""
    )
    run = open_run(path, tmp_path / "run")
    pipeline.train(run)
    assert "gates" in pipeline.score(run)
    space = space_for(load(tmp_path / "run" / "dense"))
    scores = load_importance(tmp_path / "run" / "scores.safetensors", space).scores
    assert scores["hidden.0"].std() > 0 and scores["hidden.0"].mean() < 1
    with refused("score.gates", "lambdas"):
        pipeline.score(open_run(tmp_path / "run", overrides=("score.options.lambdas=1",)))
