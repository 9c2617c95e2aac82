"""Alignment leaves what a model computes, and repair is the least squares that it says it is; for every backbone."""

from functools import cache

import numpy as np
import pytest
import torch
from backbones import BACKBONES, MMDET_PVT, MMDET_SWIN, PVT, SWIN, SWIN_V2, VIT_TINY, Backbone, dense, random_plan
from torch.testing import assert_close

from sidt.errors import InputError
from sidt.space.axes import kept_indices
from sidt.space.families import INNER_KINDS
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.alignment import align
from sidt.surgery.compensation import compensate, readers, refit, refit_width
from sidt.surgery.moments import Moments, measure_moments
from sidt.surgery.slicing import slice_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NO_LABELS = torch.zeros(1)


def outputs(model, images):
    with torch.no_grad():
        found = model(images)
    return found if isinstance(found, tuple | list) else (found,)


@cache
def measured(backbone: Backbone) -> tuple[torch.nn.Module, Moments, torch.nn.Module, Moments]:
    """The model and its moments, and both aligned."""
    model, space = dense(backbone)
    moments = measure_moments(model, [(backbone.images(8), NO_LABELS)], space=space)
    return model, moments, *align(model, moments)


@pytest.fixture(params=BACKBONES, ids=str)
def backbone(request):
    return request.param


def test_aligned_computes_the_same(backbone):
    model, _, aligned, _ = measured(backbone)
    images = torch.randn(3, *dense(backbone)[1].trace.input_size)  # not the calibration images
    assert_close(outputs(aligned, images), outputs(model, images), rtol=1e-3, atol=1e-3)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, aligned.get_parameter(n))]
    if not any(word in str(backbone) for word in ("beit3", "dpwee", "mvitv2")):  # which have a norm over v
        assert len(changed) >= len(dense(backbone)[1].attention)


def test_aligned_moments_are_those_of_the_aligned_model(backbone):
    _, _, aligned, moments = measured(backbone)
    again = measure_moments(aligned, [(backbone.images(8), NO_LABELS)], space=moments.space)
    for name in readers(moments.space):
        expected = again.read_by(name)
        assert_close(moments.read_by(name), expected, rtol=0, atol=2e-3 * float(expected.diagonal().max()))


def test_nothing_dropped_is_bit_identical(backbone):
    model, moments, *_ = measured(backbone)
    full = compensate(model, DimensionPlan(moments.space, {}), moments)
    assert all(torch.equal(a, b) for a, b in zip(full.state_dict().values(), model.state_dict().values(), strict=True))


def squared_error(model, small, plan, moments, name):
    """Of what a layer writes, over the calibration inputs, by the dense layer's moments."""
    space = plan.space
    rows, columns = (kept_indices(a, space.sizes, plan.keep, space.per) for a in space.places[name].axes[:2])
    weight, kept = (m.get_parameter(name).detach().double().flatten(1) for m in (model, small))
    difference = weight[rows]
    difference[:, columns] -= kept
    bias = name.replace("weight", "bias")
    if bias in dict(model.named_parameters()):
        shift = (model.get_parameter(bias)[rows] - small.get_parameter(bias)).detach().double()
        difference = torch.cat([difference, shift[:, None]], 1)
        moment = moments.read_by(name)
    else:
        moment = moments.read_by(name)[:-1, :-1]
    return float(((difference @ moment) * difference).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_repair_is_never_worse_than_slicing_and_changes_only_the_readers(backbone, seed):
    model, moments, *_ = measured(backbone)
    plan = random_plan(moments.space, seed, INNER_KINDS)
    plain, repaired = slice_model(model, plan), compensate(model, plan, moments)
    better, lost = 0, 0
    for name in readers(moments.space):
        before, after = (squared_error(model, m, plan, moments, name) for m in (plain, repaired))
        assert after <= before * (1 + 1e-4) + 1e-9
        better += after < 0.99 * before
        lost += before > 0
    assert better >= lost / 2 and (lost or not readers(moments.space))  # all are behind norms
    own = set(readers(moments.space))
    own |= {name.replace("weight", "bias") for name in own}
    for name, tensor in repaired.state_dict().items():
        assert name in own or torch.equal(tensor, plain.state_dict()[name])


def test_least_squares_by_hand():
    """y = 1 x1 + 2 x2 + 3; without x2 = 2 x1 + 1 the same is written as 5 x1 + 5."""
    x1 = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    x = torch.stack([x1, 2 * x1 + 1, torch.ones(4, dtype=torch.float64)], 1)
    moment, weight, kept = x.T @ x / 4, torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor([0, 2])
    near, seen = weight[:, kept], moment[kept][:, kept]
    found = refit(near, weight @ moment[:, kept] - near @ seen, seen)
    assert_close(found, torch.tensor([[5.0, 5.0]], dtype=torch.float64), rtol=1e-3, atol=1e-3)


def logits(model, images, head=0):
    """q k^T of the first block's head, each row without its mean, for a plain ViT."""
    attention, seen = model.blocks[0].attn, []
    with torch.no_grad(), attention.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(images)
    q, k, _ = attention.qkv(seen[0]).chunk(3, -1)
    size = attention.qkv.out_features // 3 // attention.num_heads
    q, k = (t[..., head * size : (head + 1) * size].double() for t in (q, k))
    scores = q @ (k - k.flatten(0, 1).mean(0)).transpose(1, 2)
    return scores.detach(), q, k


def test_the_first_units_of_qk_are_a_better_fit_of_the_logits_than_any_of_the_own():
    model, _, aligned, _ = measured(VIT_TINY)
    images, kept = VIT_TINY.images(8), 8
    whole, q, k = logits(model, images)
    aligned_whole, aligned_q, aligned_k = logits(aligned, images)
    assert_close(aligned_whole, whole, rtol=1e-3, atol=1e-3)

    def error(q, k, units):
        centred = k - k.flatten(0, 1).mean(0)
        return float((whole - q[..., units] @ centred[..., units].transpose(1, 2)).square().mean())

    energy = aligned_q.square().mean((0, 1)) * (aligned_k - aligned_k.flatten(0, 1).mean(0)).square().mean((0, 1))
    assert (energy.diff() <= 1e-6 * energy[0]).all()  # they come in order
    first = error(aligned_q, aligned_k, list(range(kept)))
    rng = np.random.default_rng(0)
    assert all(first < error(q, k, rng.permutation(64)[:kept].tolist()) for _ in range(20))


@pytest.mark.parametrize("backbone", [VIT_TINY, SWIN, PVT, MMDET_PVT], ids=str)
def test_aligned_and_repaired_is_nearer_to_the_dense_model_than_sliced(backbone):
    model, _, aligned, moments = measured(backbone)
    space = moments.space
    half = {}
    for name, dimension in space.dimensions.items():
        count = max(1, dimension.size // 2)
        if dimension.kind in ("qk", "v"):
            half[name] = np.tile(np.arange(count), (space.sizes[dimension.per], 1))
        elif dimension.kind == "mlp":
            half[name] = np.arange(count)
    plan, images = DimensionPlan(space, half), backbone.images(8)
    expected = outputs(model, images)

    def gap(small):
        found = outputs(small, images)
        return sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))

    assert gap(compensate(aligned, plan, moments)) < 0.8 * gap(slice_model(model, plan))


@pytest.mark.parametrize("backbone", [VIT_TINY, SWIN, PVT, MMDET_PVT, MMDET_SWIN], ids=str)
def test_layers_that_lost_width_are_refitted_to_what_the_dense_model_writes(backbone):
    model, space = dense(backbone)
    width = {d.name: np.arange(d.size * 3 // 4) for d in space.dimensions.values() if d.kind == "width"}
    plan, batches = DimensionPlan(space, width), [(backbone.images(8), NO_LABELS)]
    sliced = slice_model(model, plan)
    before = {n: t.clone() for n, t in sliced.state_dict().items()}
    refitted = refit_width(model, sliced, plan, batches)
    assert all(torch.equal(t, before[n]) for n, t in sliced.state_dict().items())
    changed = {n for n, t in refitted.state_dict().items() if not torch.equal(t, before[n])}
    assert all("norm" not in n and "patch_embed" not in n for n in changed) and len(changed) > 6
    expected = outputs(model, batches[0][0])

    def gap(small):
        found = outputs(small, batches[0][0])
        kept = [
            e if f.shape == e.shape else e[:, width[f"embed.{i}"]]
            for i, (f, e) in enumerate(zip(found, expected, strict=True))
        ]
        return sum(float((f - e).square().mean() / e.square().mean()) for f, e in zip(found, kept, strict=True))

    assert gap(refitted) < 0.8 * gap(sliced)
    whole = DimensionPlan(space, {})
    assert refit_width(model, model, whole, batches) is model


def test_what_cannot_be_aligned_stays():
    """Cosine attention has no basis to choose for q and k; v has."""
    model, _, aligned, _ = measured(SWIN_V2)
    for name, parameter in model.named_parameters():
        if name.endswith("attn.qkv.weight"):
            before, after = parameter.chunk(3), aligned.get_parameter(name).chunk(3)
            assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
            assert not torch.equal(before[2], after[2])


def test_a_sliced_model_can_be_aligned_and_repaired_again():
    model, moments, *_ = measured(VIT_TINY)
    small = compensate(model, random_plan(moments.space, 0, INNER_KINDS), moments)
    space, batches = space_for(small), [(VIT_TINY.images(8), NO_LABELS)]
    aligned, again = align(small, measure_moments(small, batches, space=space))
    assert_close(outputs(aligned, batches[0][0]), outputs(small, batches[0][0]), rtol=1e-3, atol=1e-3)
    smaller = compensate(aligned, random_plan(space, 1, INNER_KINDS), again)
    assert smaller.sidt_plan.space.sizes == moments.space.sizes


def test_the_given_model_is_not_changed():
    model = VIT_TINY.build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    moments = measure_moments(model, [(VIT_TINY.images(), NO_LABELS)])
    aligned, moments = align(model, moments)
    compensate(aligned, random_plan(moments.space, 0, INNER_KINDS), moments)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_mistakes():
    model, moments, *_ = measured(VIT_TINY)
    with pytest.raises(InputError, match="no batch"):
        measure_moments(model, [])
    with pytest.raises(InputError, match="no batch"):
        refit_width(model, model, random_plan(moments.space, 0, ("width",)), [])
    empty = Moments(moments.space, {})
    with pytest.raises(InputError, match=r"no calibration image went through blocks\.0"):
        compensate(model, random_plan(moments.space, 0, INNER_KINDS), empty)
    images = torch.full_like(VIT_TINY.images(2), torch.nan)
    with pytest.raises(InputError, match=r"blocks\.0\S* reads is not finite"):
        measure_moments(model, [(images, NO_LABELS)])
    with pytest.raises(InputError, match="not finite"):
        refit(torch.ones(2, 2), torch.ones(2, 2), torch.full((2, 2), torch.nan))
