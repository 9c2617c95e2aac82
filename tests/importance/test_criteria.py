"""Importance on a two-layer network whose scores are computed by hand, and its invariants on a ViT."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from sidt import importance
from sidt.errors import InputError
from sidt.importance.scores import Importance, load_importance, unit_sums
from sidt.space.space import space_for

SPACE = """
models: [tests.importance.test_criteria.Tiny]
axes:
  hidden: mlp
parameters:
  fc1.weight: hidden, _
  fc2.weight: _, hidden
"""


class Tiny(nn.Module):
    """y = W2 W1 x, with hidden size 3."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
        self.fc1.weight.data = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [0.5, 0.5]])
        self.fc2.weight.data = torch.tensor([[1.0, -1.0, 4.0]])

    def forward(self, x):
        return self.fc2(self.fc1(x.flatten(1)))


def output(model, batch):
    """A loss that is the mean output, so that gradients are easy to write down."""
    return model(batch[0]).mean()


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.yaml").write_text(SPACE)
    model = Tiny()
    return model, space_for(model, (2, 1, 1), file=tmp_path / "tiny.yaml")


# For one input x: d/dW2 = h, d/dW1 = W2^T x^T. With x = (1, 2): h = (5, -3, 1.5).
IMAGES = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).view(2, 2, 1, 1)
TARGETS = torch.zeros(2, dtype=torch.int64)


def test_magnitude(tiny):
    model, space = tiny
    l1 = importance.magnitude(model, space=space).scores["hidden"]
    l2 = importance.magnitude(model, p=2, space=space).scores["hidden"]
    np.testing.assert_allclose(l1, [1 + 2 + 1, 3 + 0 + 1, 0.5 + 0.5 + 4])
    np.testing.assert_allclose(l2, np.sqrt([1 + 4 + 1, 9 + 1, 0.25 + 0.25 + 16]))


def test_taylor_unit(tiny):
    model, space = tiny
    # sum w * grad of unit k is h_k W2_k (fc2) + W2_k W1_k x (fc1) = 2 h_k W2_k.
    first = 2 * np.array([5.0, -3.0, 1.5]) * [1, -1, 4]
    second = 2 * np.array([3.0, -9.0, 1.5]) * [1, -1, 4]
    each = importance.taylor(model, [(IMAGES, TARGETS)], output, group=1, space=space)
    together = importance.taylor(model, [(IMAGES, TARGETS)], output, group=2, space=space)
    np.testing.assert_allclose(each.scores["hidden"], (first**2 + second**2) / 2, rtol=1e-6)
    np.testing.assert_allclose(together.scores["hidden"], ((first + second) / 2) ** 2, rtol=1e-6)


def test_taylor_parameter_and_fisher(tiny):
    model, space = tiny
    w1, w2 = model.fc1.weight.detach().numpy(), model.fc2.weight.detach().numpy()[0]
    expected = 0
    for x in ([1.0, 2.0], [3.0, 0.0]):
        h = w1 @ x
        expected = expected + (w2 * h) ** 2 + ((w1 * np.outer(w2, x)) ** 2).sum(1)
    fisher = importance.fisher(model, [(IMAGES, TARGETS)], output, space=space)
    level = importance.taylor(model, [(IMAGES, TARGETS)], output, level="parameter", group=1, space=space)
    np.testing.assert_allclose(fisher.scores["hidden"], expected / 2, rtol=1e-6)
    np.testing.assert_allclose(level.scores["hidden"], expected / 2, rtol=1e-6)


def test_activation(tiny):
    model, space = tiny
    h = np.array([[5.0, -3.0, 1.5], [3.0, -9.0, 1.5]])
    scores = importance.activation(model, [(IMAGES, TARGETS)], space=space).scores["hidden"]
    np.testing.assert_allclose(scores, (h**2).mean(0) * np.array([1, 1, 16]), rtol=1e-6)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, qk_norm=True)
    torch.manual_seed(1)
    return model, space_for(model), (torch.randn(12, 3, 32, 32), torch.arange(12) % 5)


def split(batch, size):
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


CRITERIA = {
    "taylor": lambda m, b, s: importance.taylor(m, b, group=3, space=s),
    "taylor-parameter": lambda m, b, s: importance.taylor(m, b, level="parameter", group=5, space=s),
    "fisher": lambda m, b, s: importance.fisher(m, b, space=s),
    "activation": lambda m, b, s: importance.activation(m, b, space=s),
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_depend_on_the_batch_split(vit, criterion):
    model, space, batch = vit
    whole = CRITERIA[criterion](model, [batch], space).scores
    for size in (1, 5, 7):
        for name, scores in CRITERIA[criterion](model, split(batch, size), space).scores.items():
            np.testing.assert_allclose(scores, whole[name], rtol=2e-3, atol=1e-6 * np.abs(whole[name]).max())
            assert scores.std() > 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_model_is_left_as_it_was(vit, criterion):
    model, space, batch = vit
    model.train()
    model.blocks[0].eval()
    model.norm.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    CRITERIA[criterion](model, [batch], space)
    assert model.training and not model.blocks[0].training
    assert not model.norm.weight.requires_grad and model.head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.norm.weight.requires_grad_(True)


def test_reduction_counts_every_entry_of_every_place(vit):
    model, space, _ = vit
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    sums = unit_sums(space, ones.items())
    assert sums["qk.0"].shape == (3, 64)
    attention = model.blocks[0].attn
    # A v unit of a head: a row of v with its bias, and a column of proj.
    assert torch.equal(sums["v.0"], torch.full((3, 64), 192.0 + 1 + 192))
    assert sums["hidden.1"].eq(192 + 1 + 192).all()
    whole = attention.qkv.weight.numel() + attention.qkv.bias.numel() + attention.proj.weight.numel()
    assert sums["heads.0"].sum() == whole


def test_random_depends_on_the_seed(vit):
    model, space, _ = vit
    first, again, other = (importance.random(model, seed=s, space=space).scores["hidden.0"] for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_save_and_load(vit, tmp_path):
    model, space, _ = vit
    scores = importance.magnitude(model, space=space)
    scores.save(tmp_path / "scores.safetensors")
    back = load_importance(tmp_path / "scores.safetensors", space)
    assert all(np.array_equal(back.scores[n], s) for n, s in scores.scores.items())
    (tmp_path / "scores.safetensors").write_bytes((tmp_path / "scores.safetensors").read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read the scores"):
        load_importance(tmp_path / "scores.safetensors", space)


def test_bad_input(vit):
    model, space, batch = vit
    with pytest.raises(InputError, match="no batch"):
        importance.taylor(model, [], space=space)
    with pytest.raises(InputError, match="no batch"):
        importance.activation(model, [], space=space)
    with pytest.raises(InputError, match="got 3"):
        importance.magnitude(model, p=3, space=space)
    with pytest.raises(InputError, match="level="):
        importance.taylor(model, [batch], level="head", space=space)
    with pytest.raises(InputError, match="the loss is nan"):
        importance.taylor(model, [batch], lambda m, b: m(b[0]).sum() * torch.nan, space=space)
    with pytest.raises(InputError, match=r"scores of heads.0 have shape None"):
        Importance(space, {"embed": np.ones(192)})
