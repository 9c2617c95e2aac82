"""Unused Path Removal: what is planted leaves, nothing else does, and the outputs stay."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from backbones import (
    BACKBONES,
    CAIT,
    MMDET_PVT,
    MMDET_SWIN,
    PVT,
    SWIN,
    SWIN_V2,
    TIMM_BACKBONES,
    VIT,
    VIT_TINY,
    Backbone,
    dense,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sidt.space.axes import names, views
from sidt.space.outputs import tensors_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.sparsity import fold_constants, remove_unused, unused_plan
from sidt.surgery.slicing import is_bilinear, mask_model, slice_model

GATED = next(b for b in TIMM_BACKBONES if b.gated)
SWIGLU, PACKED = (next(b for b in TIMM_BACKBONES if part in str(b)) for part in ("swiglu", "giant"))
FAMILIES = (VIT_TINY, SWIN, PVT)


def outputs(model, backbone):
    """What a model gives, in its own precision."""
    with torch.no_grad():
        found = model(backbone.images(1).to(next(model.parameters())))
    return tuple(tensors_of(found))


def assert_same_outputs(smaller, model, backbone):
    """To 1e-6 in float32 and 1e-9 in float64, of the largest output."""
    tolerance = 1e-6 if next(model.parameters()).dtype == torch.float32 else 1e-9
    for found, expected in zip(outputs(smaller, backbone), outputs(model, backbone), strict=True):
        assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def clear(model, space, name, units, *, dim, weights=True, biases=True, stretches=slice(None)):
    """Set units of a dimension to zero along an axis of all tensors: weights, vectors, or only some stretches."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for several, wanted in ((True, weights), (False, biases)):
        found = [
            (tensors[place], *view)
            for place, at in space.places.items()
            if wanted and len(at.axes) > dim and (len(at.axes) > 1) == several
            for view in views(at.axes[dim], space.sizes, name, space.per)
        ]
        for tensor, entries, view, kept in found[stretches]:
            shape = [size if position in kept else 1 for position, size in enumerate(view)]
            gone = np.array(entries)[np.broadcast_to(units.reshape(shape), view).reshape(-1)]
            with torch.no_grad():
                tensor.detach().movedim(dim, 0)[gone] = 0


@cache
def bare(backbone):
    """A model of its own, unshared; tests copy it."""
    return backbone.build(), dense(backbone)[1]


def planted(backbone):
    model, space = bare(backbone)
    return copy.deepcopy(model), space


@st.composite
def choices(draw, backbone):
    """Units of every dimension and how they die: rows, columns; k, q; at most all but one, or a whole head or MLP."""
    space, seed = dense(backbone)[1], draw(st.integers(0, 2**16))
    whole = draw(st.sampled_from(sorted(n for n, d in space.dimensions.items() if d.kind in ("heads", "mlp"))))
    return seed, whole, {n: draw(st.sampled_from(("row", "column"))) for n in space.dimensions}


def plant(model, space, seed, whole, ways):
    """Zero them; returns the sizes that are then right."""
    rng, sizes = np.random.default_rng(seed), dict(space.sizes)
    for heads, owner in space.attention.items():
        qk, v = sorted((d for d in space.dimensions.values() if d.per == heads), key=lambda d: d.kind)
        count = space.sizes[heads]
        gone = np.zeros(count, dtype=bool)
        gone[rng.permutation(count)[: count if heads == whole else rng.integers(count)]] = True
        dead = rng.random((count, v.size)) < 0.6
        dead[:, 0] = False
        clear(model, space, v.name, dead | gone[:, None], dim=int(ways[v.name] == "column"), biases=False)
        sizes[heads] = count - int(gone.sum())
        sizes[v.name] = max(int((~dead[~gone]).sum(1).max(initial=1)), 1)
        same = rng.random((count, qk.size)) < 0.6
        which = slice(1, 2) if ways[qk.name] == "row" else slice(0, 1)  # k, whose bias may stay, or q
        clear(model, space, qk.name, same, dim=0, biases=which.start == 0, stretches=which)
        if is_bilinear(model.get_submodule(owner), space.forwards):
            sizes[qk.name] = max(int((~same[~gone]).sum(1).max(initial=1)), 1)
        if gone.all():
            sizes |= {qk.name: 1, v.name: 1}
    convolved = {d for n, p in space.places.items() if p.axes and len(p.axes) == 4 for d in names(p.axes[0])}
    for mlp in (d for d in space.dimensions.values() if d.kind == "mlp"):
        dead = rng.random(mlp.size) < (1 if mlp.name == whole else 0.6)
        # Behind a row of zeros, a depthwise convolution sees its border unless the bias is zero too.
        clear(model, space, mlp.name, dead, dim=int(ways[mlp.name] == "column"), biases=mlp.name in convolved)
        sizes[mlp.name] = mlp.size - int(dead.sum())
    return sizes


@pytest.mark.parametrize("backbone", [*FAMILIES, SWIN_V2, MMDET_SWIN, MMDET_PVT], ids=str)
@settings(max_examples=5)
@given(data=st.data())
def test_what_is_planted_leaves_and_the_outputs_stay(backbone, data):
    model, space = planted(backbone)
    sizes = plant(model, space, *data.draw(choices(backbone)))
    model.to(data.draw(st.sampled_from((torch.float32, torch.float64))))
    before = copy.deepcopy(model.state_dict())
    smaller = remove_unused(model, space)
    assert smaller.sidt_plan.sizes == sizes
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    assert_same_outputs(smaller, model, backbone)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
@settings(max_examples=3)
@given(data=st.data())
def test_it_is_idempotent(backbone, data):
    model, space = planted(backbone)
    plant(model, space, *data.draw(choices(backbone)))
    once = remove_unused(model, space)
    twice = remove_unused(once, space_for(once, backbone.input_size))
    assert twice.sidt_plan.sizes == once.sidt_plan.sizes
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), once.state_dict().values(), strict=True))


@pytest.mark.parametrize("backbone", BACKBONES, ids=str)
def test_a_model_without_zeros_stays_as_it_is(backbone):
    model, space = dense(backbone)
    same = remove_unused(model, space)
    assert same.sidt_plan.sizes == space.sizes
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))


def some(size, *units):
    mask = np.zeros(size, dtype=bool)
    mask[list(units)] = True
    return mask


def hidden(space):
    return next(d for d in space.dimensions.values() if d.kind == "mlp")


def child(space, kind):
    """In the last block: the first of PVT have one head."""
    return [d for d in space.dimensions.values() if d.kind == kind][-1]


@pytest.mark.parametrize("backbone", BACKBONES, ids=str)
def test_what_is_not_read_leaves_every_backbone(backbone):
    """Unread hidden units, v units and heads: also those of gates, SwiGLU and depthwise convolutions."""
    model, space = planted(backbone)
    mlp, v = hidden(space), child(space, "v")
    heads = space.dimensions[v.per]
    gone = np.zeros((heads.size, v.size), dtype=bool)
    gone[:, 1], gone[0] = True, True
    clear(model, space, mlp.name, some(mlp.size, 0, 3), dim=1)
    clear(model, space, v.name, gone, dim=1)
    clear(model, space, heads.name, some(heads.size, 0), dim=1)  # also by what mixes heads
    smaller = remove_unused(model, space)
    expected = dict(space.sizes)
    if not mlp.normed:
        expected[mlp.name] -= 2
    if not heads.normed:
        expected |= {heads.name: heads.size - 1, v.name: v.size - (not v.fixed)}
    assert smaller.sidt_plan.sizes == expected
    assert_same_outputs(smaller, model, backbone)


def test_a_head_that_others_are_mixed_with_is_read():
    """CaiT's: no v of head 0 is read, but its logits and its attention map are."""
    model, space = planted(CAIT)
    heads, v = space.dimensions["heads.0"], space.dimensions["v.0"]
    gone = np.zeros((heads.size, v.size), dtype=bool)
    gone[0] = True
    clear(model, space, v.name, gone, dim=1)
    smaller = remove_unused(model, space)
    assert smaller.sidt_plan.sizes == space.sizes
    clear(model, space, heads.name, some(heads.size, 0), dim=1)
    smaller = remove_unused(model, space)
    assert smaller.sidt_plan.sizes == {**space.sizes, "heads.0": heads.size - 1}
    assert_same_outputs(smaller, model, CAIT)


@pytest.mark.parametrize("backbone", [PVT, MMDET_PVT], ids=str)
def test_a_depthwise_convolution_sees_its_border(backbone):
    """Of three units with rows of zeros, one has a bias: it stays, unless its filter is zero."""
    model, space = planted(backbone)
    mlp = hidden(space)
    clear(model, space, mlp.name, some(mlp.size, 0, 1, 2), dim=0, biases=False, stretches=slice(0, 1))
    clear(model, space, mlp.name, some(mlp.size, 0), dim=0, weights=False, stretches=slice(0, 1))
    clear(model, space, mlp.name, some(mlp.size, 1, 5), dim=0, biases=False, stretches=slice(1, 2))
    smaller = remove_unused(model, space)
    kept = set(range(mlp.size)) - {0, 1, 5}
    assert set(smaller.sidt_plan.keep[mlp.name].tolist()) == kept and 2 in kept
    assert_same_outputs(smaller, model, backbone)


def test_a_map_of_one_position_does_not_hide_a_border():
    model, space = planted(Backbone(PVT.name, PVT.kwargs, (3, 32, 32)))
    mlp = [d for d in space.dimensions.values() if d.kind == "mlp"][-1]
    clear(model, space, mlp.name, some(mlp.size, 0, 1), dim=0, biases=False, stretches=slice(0, 1))
    clear(model, space, mlp.name, some(mlp.size, 1), dim=0, weights=False, stretches=slice(0, 1))
    smaller = remove_unused(model, space)
    assert smaller.sidt_plan.sizes == space.sizes | {mlp.name: mlp.size - 1}
    assert_same_outputs(smaller, model, PVT)  # on larger images


class Ramp(nn.Module):
    """An activation that tells tokens apart."""

    def forward(self, x):
        return x + torch.arange(x.shape[1]).to(x).unsqueeze(1)


def test_what_varies_is_no_constant_though_its_row_is_zero():
    model, space = planted(VIT_TINY)
    mlp = hidden(space)
    model.blocks[0].mlp.act = Ramp()
    clear(model, space, mlp.name, some(mlp.size, 0), dim=0, biases=False)
    assert remove_unused(model, space).sidt_plan.sizes == space.sizes


@pytest.mark.parametrize("backbone", [SWIGLU, PACKED], ids=str)
def test_half_a_product_is_not_dead(backbone):
    model, space = planted(backbone)
    mlp = hidden(space)
    clear(model, space, mlp.name, some(mlp.size, 0, 1), dim=0, biases=False, stretches=slice(0, 1))
    clear(model, space, mlp.name, some(mlp.size, 1, 2), dim=0, biases=False, stretches=slice(1, 2))
    smaller = remove_unused(model, space)
    assert set(range(mlp.size)) - set(smaller.sidt_plan.keep[mlp.name].tolist()) == {1}
    assert_same_outputs(smaller, model, backbone)


def test_a_gate_makes_a_constant_vary():
    model, space = planted(GATED)
    v = child(space, "v")
    dead = np.tile(some(v.size, 4, 5), (space.sizes[v.per], 1))
    clear(model, space, v.name, dead, dim=0, biases=False, stretches=slice(0, 1))
    assert remove_unused(model, space).sidt_plan.sizes == space.sizes
    dead[:, 5] = False
    clear(model, space, v.name, dead, dim=0, biases=False)
    smaller = remove_unused(model, space)
    assert smaller.sidt_plan.sizes[v.name] == v.size - 1
    assert_same_outputs(smaller, model, GATED)


def test_a_query_with_a_bias_compares_and_a_key_with_one_does_not():
    model, space = planted(VIT_TINY)
    qk = child(space, "qk")
    all_heads = np.tile(some(qk.size, 2, 3), (space.sizes[qk.per], 1))
    clear(model, space, qk.name, all_heads, dim=0, biases=False, stretches=slice(0, 1))
    assert remove_unused(model, space).sidt_plan.sizes == space.sizes
    all_heads = np.roll(all_heads, 3, axis=1)
    clear(model, space, qk.name, all_heads, dim=0, biases=False, stretches=slice(1, 2))
    smaller = remove_unused(model, space)
    assert smaller.sidt_plan.sizes[qk.name] == qk.size - 2
    assert_same_outputs(smaller, model, VIT_TINY)


@pytest.mark.parametrize("backbone", [SWIN_V2, next(b for b in TIMM_BACKBONES if b.label == "qk_norm")], ids=str)
def test_lengths_of_q_and_k_count_where_they_are_normalised(backbone):
    model, space = planted(backbone)
    qk = child(space, "qk")
    clear(model, space, qk.name, np.tile(some(qk.size, 2), (space.sizes[qk.per], 1)), dim=0, stretches=slice(1, 2))
    assert remove_unused(model, space).sidt_plan.sizes == space.sizes


def test_a_constant_stays_where_its_reader_has_no_bias():
    backbone = Backbone("vit_tiny_patch16_224", VIT | {"depth": 1, "proj_bias": False})
    model, space = planted(backbone)
    v = child(space, "v")
    all_heads = np.tile(some(v.size, 6, 7), (space.sizes[v.per], 1))
    clear(model, space, v.name, all_heads, dim=0, biases=False)
    assert remove_unused(model, space).sidt_plan.sizes == space.sizes
    all_heads[:, 6] = False
    clear(model, space, v.name, all_heads, dim=0)
    smaller = remove_unused(model, space)
    assert smaller.sidt_plan.sizes[v.name] == v.size - 1
    assert_same_outputs(smaller, model, backbone)


def test_each_head_gives_as_many_as_the_one_that_has_least():
    model, space = planted(VIT_TINY)
    v = child(space, "v")
    dead = np.zeros((space.sizes[v.per], v.size), dtype=bool)
    dead[0, :5], dead[1, 4:7], dead[2, [8, 1]] = True, True, True
    clear(model, space, v.name, dead, dim=0, biases=False)
    keep = remove_unused(model, space).sidt_plan.keep[v.name]
    assert keep.shape == (3, v.size - 2)
    for row, kept in zip(dead, keep, strict=True):
        assert set(np.flatnonzero(~row)) <= set(kept.tolist())


@pytest.mark.parametrize("kind", ["qk", "v"])
def test_one_unit_stays_of_heads_that_stay(kind):
    """All q/k units dead: softmax is uniform. A head without any v unit leaves, so of v there is one anyway."""
    model, space = planted(VIT_TINY)
    d = child(space, kind)
    if kind == "qk":
        clear(model, space, d.name, np.ones((space.sizes[d.per], d.size), dtype=bool), dim=0)
    else:
        dead = np.ones((space.sizes[d.per], d.size), dtype=bool)
        dead[1, 3] = False
        clear(model, space, d.name, dead, dim=0)
    smaller = remove_unused(model, space)
    assert smaller.sidt_plan.sizes == space.sizes | {d.name: 1} | ({} if kind == "qk" else {d.per: 1})
    assert_same_outputs(smaller, model, VIT_TINY)


def test_folding_changes_no_output_and_the_plan_only_what_is_not_read():
    model, space = planted(VIT_TINY)
    mlp = hidden(space)
    clear(model, space, mlp.name, some(mlp.size, 0, 1, 2), dim=0, biases=False)
    assert unused_plan(model, space).sizes == space.sizes
    folded = fold_constants(model, space)
    assert_same_outputs(folded, model, VIT_TINY)
    plan = unused_plan(folded, space)
    assert plan.sizes == space.sizes | {mlp.name: mlp.size - 3}
    assert_same_outputs(mask_model(folded, plan), model, VIT_TINY)
    assert_same_outputs(slice_model(folded, plan), model, VIT_TINY)


def test_it_takes_up_where_a_slice_left_off():
    model, space = planted(SWIN)
    mlp = hidden(space)
    clear(model, space, mlp.name, some(mlp.size, 2), dim=0, biases=False)
    first = slice_model(model, DimensionPlan(space, {mlp.name: np.arange(1, mlp.size)}))
    smaller = remove_unused(first, space_for(first, SWIN.input_size))
    assert smaller.sidt_plan.keep[mlp.name].tolist() == [1, *range(3, mlp.size)]
    assert_same_outputs(smaller, first, SWIN)


def test_the_model_is_run_as_it_is_told():
    class Framed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model, space = planted(VIT_TINY)
    mlp, seen = hidden(space), []
    clear(model, space, mlp.name, some(mlp.size, 0), dim=0, biases=False)

    def forward(given, batch):
        seen.append(batch[0].shape)
        return given(batch[0])

    remove_unused(model, space, forward=forward)
    assert seen == [(2, *space.trace.input_size)]
    remove_unused(bare(VIT_TINY)[0], space, forward=forward)
    assert len(seen) == 1  # without a row of zeros there is nothing to look at
