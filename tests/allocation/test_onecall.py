"""One call: with labels, without, without a head, with a loss of one's own; what it says is what is there."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import sidt
from sidt.allocation import Rules, ShrinkResult
from sidt.errors import InputError
from sidt.importance import own_outputs, taylor
from sidt.training.evaluation import distances

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def small_vit(num_classes: int = 5) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **ARGS, num_classes=num_classes).eval()


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(48, 3, 16, 16, generator=generator), torch.randint(5, (48,), generator=generator)
    return list(zip(images.split(16), labels.split(16), strict=True))


def shrunk(model, batches, **options) -> ShrinkResult:
    return sidt.shrink(model, batches, sidt.Budget(params=0.5), progress=False, **options)


def test_a_model_within_the_budget_that_can_be_saved(pairs, tmp_path):
    model = small_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = shrunk(model, pairs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert result.report.params == sum(p.numel() for p in result.model.parameters()) <= 0.5 * result.dense.params
    assert result.report.params > 0.48 * result.dense.params
    assert result.dense.params == sum(p.numel() for p in model.parameters())
    assert result.plan is result.model.sidt_plan
    with torch.no_grad():
        losses = [sum(F.cross_entropy(m(x), y).item() for x, y in pairs) / 3 for m in (model, result.model)]
        same = [float((model(x).argmax(1) == result.model(x).argmax(1)).float().mean()) for x, _ in pairs]
    assert result.loss == pytest.approx(losses, abs=1e-5) and result.agreement == pytest.approx(sum(same) / 3)
    assert f"{result.report.params:,}" in str(result) and "\n" not in str(result)
    sidt.save(result.model, tmp_path / "small", args={**ARGS, "num_classes": 5, "norm_layer": _norm(result.model)})
    loaded = sidt.load(tmp_path / "small")
    assert torch.allclose(loaded(pairs[0][0]), result.model(pairs[0][0]), atol=1e-5)


def _norm(model: torch.nn.Module) -> str:
    return "rmsnorm" if type(model.norm).__name__ == "RmsNorm" else "layernorm"


def test_what_was_lost_is_measured_without_dropout_and_modes_stay(pairs):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGS, num_classes=5, drop_rate=0.5, proj_drop_rate=0.5)
    still, moving = shrunk(copy.deepcopy(model).eval(), pairs), shrunk(model.train(), pairs)
    assert moving.loss == still.loss and moving.agreement == still.agreement
    assert all(m.training for m in (*model.modules(), *moving.model.modules()))


def test_images_alone_need_no_labels_and_an_iterator_is_enough(pairs):
    model = small_vit()
    blind = shrunk(model, [images for images, _ in pairs])
    again = shrunk(model, (images for images, _ in pairs))
    unknown = shrunk(model, [(images, torch.full_like(labels, -1)) for images, labels in pairs])
    for other in (again, unknown):
        assert other.plan.to_json() == blind.plan.to_json() and other.loss == blind.loss
    with torch.no_grad():
        apart = [distances(blind.model(x), model(x), features=False).mean().item() for x, _ in pairs]
    assert blind.loss == (0, pytest.approx(sum(apart) / 3, abs=1e-6)) and blind.agreement is not None


def test_a_model_without_a_head_gives_the_same_kind_of_features(pairs):
    model = small_vit(num_classes=0)
    result = shrunk(model, [images for images, _ in pairs])
    images = pairs[0][0]
    with torch.no_grad():
        wanted, seen = model(images), result.model(images)
    assert seen.shape == wanted.shape and result.agreement is None
    assert 0 < result.loss[1] < 0.5
    plain = sidt.slice_model(model, sidt.allocate(sidt.importance.random(model), sidt.Budget(params=0.5)))
    with torch.no_grad():
        assert result.loss[1] < distances(plain(images), wanted, features=True).mean()


def test_steps_rules_and_a_loss_of_ones_own(pairs):
    def loss(model, batch):
        return F.mse_loss(model(batch["images"]), batch["wanted"])

    batches = [{"images": x, "wanted": F.one_hot(y, 5).float()} for x, y in pairs]
    result = shrunk(small_vit(), batches, loss=loss, steps=2, rules=Rules(kinds=("mlp",)), input_size=(3, 16, 16))
    sizes, dense = result.plan.sizes, result.plan.space.sizes
    assert {name.split(".")[0] for name in sizes if sizes[name] < dense[name]} == {"hidden"}
    assert result.agreement is None and result.loss[0] > 0
    assert result.report.params <= 0.5 * result.dense.params


def test_bad_input(pairs):
    model = small_vit()
    for batches, options, words in (
        ([], {}, "no batch"),
        (pairs, {"steps": 0}, "steps is 0"),
        (pairs, {"steps": 1000}, "from 1 to 32"),
        ([{"images": pairs[0][0]}], {}, "batches of dict"),
    ):
        with pytest.raises(InputError, match=words):
            shrunk(model, batches, **options)
    with pytest.raises(InputError, match="smallest reachable"):
        sidt.shrink(model, pairs, sidt.Budget(params=0.001), progress=False)


def test_scores_without_labels_are_those_of_the_fisher_information(pairs):
    """What is drawn has the mean over all answers, each by its probability, as its expectation."""
    model = small_vit()
    images = torch.cat([x for x, _ in pairs])[:12]
    many = [(images.repeat(40, 1, 1, 1), torch.zeros(12 * 40))]
    found, other = (taylor(model, many, own_outputs(features=False, seed=seed), group=1) for seed in (0, 1))
    exact = {name: 0.0 for name in found.scores}
    for image in images:
        logits = model(image[None])[0]
        for label, part in enumerate(logits.detach().softmax(0)):
            one = taylor(model, [(image[None], torch.tensor([label]))], group=1)
            exact = {name: exact[name] + float(part) * one.scores[name] / 12 for name in exact}
    for name in ("hidden.0", "hidden.1", "embed"):
        wanted = torch.tensor(exact[name]).flatten()
        for scores in (found, other):
            ratio = torch.tensor(scores.scores[name]).flatten().sum() / wanted.sum()
            assert ratio == pytest.approx(1, abs=0.1)
    assert any((found.scores[n] != other.scores[n]).any() for n in found.scores)
