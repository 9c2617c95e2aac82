"""Kept pairs of rotary attentions: which rows they are, and that each head turns its own."""

import numpy as np
import pytest
import torch
from backbones import BACKBONES, Backbone, dense, random_plan
from torch.testing import assert_close

import sidt
from sidt.allocation.greedy import allocate
from sidt.cost.budget import Budget
from sidt.importance.criteria import random as random_scores
from sidt.space.families import INNER_KINDS, read_family
from sidt.space.finding import families
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.positions import own_angles
from sidt.surgery.slicing import mask_model, slice_model

HALVES, NEIGHBOURS, LEARNED, PLAIN = (
    next(b for b in BACKBONES if b.name == name)
    for name in (
        "vit_small_patch16_dinov3_qkvb",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_rope_mixed_224",
        "eva_giant_patch14_224",
    )
)


def rows_of(backbone: Backbone) -> tuple:
    """How the rows of the first block's q stand."""
    places = dense(backbone)[1].places.values()
    return next(term for place in places for term in place.axes[0] if "qk.0" in term)


def test_a_unit_is_a_pair_where_there_are_rotary_positions():
    assert rows_of(HALVES) == ("heads.0", 2, "qk.0")
    assert rows_of(NEIGHBOURS) == rows_of(LEARNED) == ("heads.0", "qk.0", 2)
    assert rows_of(PLAIN) == ("heads.0", "qk.0")


def two_pairs_each(backbone: Backbone) -> DimensionPlan:
    """Heads 0 and 2 of the first block, with pairs 0 and 3 of one and 1 and 2 of the other."""
    return DimensionPlan(dense(backbone)[1], {"heads.0": np.array([0, 2]), "qk.0": np.array([[0, 3], [1, 2]])})


@pytest.mark.parametrize("backbone", [HALVES, NEIGHBOURS, LEARNED], ids=str)
def test_each_head_knows_its_own_rows(backbone):
    model, space = dense(backbone)
    plan = two_pairs_each(backbone)
    sliced = slice_model(model, plan)
    first, second = (block.attn for block in sliced.blocks)
    half = space.sizes["qk.0"]
    expected = [0, 3, half, half + 3, 1, 2, half + 1, half + 2] if backbone == HALVES else [0, 1, 6, 7, 2, 3, 4, 5]
    assert first.turned.tolist() == expected and first.turned_heads.tolist() == [0, 2]
    assert getattr(second, "turned", None) is None and getattr(second, "turned_heads", None) is None
    assert first.head_dim == 4
    assert set(sliced.state_dict()) == set(model.state_dict())
    again = slice_model(sliced, DimensionPlan(space_for(sliced), {"heads.0": np.array([1]), "qk.0": np.array([[1]])}))
    assert again.blocks[0].attn.turned.tolist() == ([2, half + 2] if backbone == HALVES else [4, 5])
    assert again.blocks[0].attn.turned_heads.tolist() == [2]


@pytest.mark.parametrize("backbone", [HALVES, NEIGHBOURS, LEARNED], ids=str)
def test_saved_models_know_their_rows(backbone, tmp_path):
    model, space = dense(backbone)
    sliced = slice_model(model, random_plan(space, 2))
    sidt.save(sliced, tmp_path)
    with torch.no_grad():
        assert torch.equal(sidt.load(tmp_path)(backbone.images()), sliced(backbone.images()))


def test_heads_alone_pick_learned_angles():
    model, space = dense(LEARNED)
    plan = DimensionPlan(space, {"heads.0": np.array([1, 3])})
    sliced = slice_model(model, plan)
    assert sliced.blocks[0].attn.turned is None
    with torch.no_grad():
        assert_close(sliced(LEARNED.images()), mask_model(model, plan)(LEARNED.images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (3,), (2, 1), (2, 3)])
def test_own_angles_of_every_shape(leading):
    rope = torch.rand(*leading, 5, 8)
    heads, rows = torch.tensor([0, 2]), torch.tensor([1, 3, 0, 2])
    found = own_angles(rope, heads, rows, 2)
    for place, head in enumerate(heads):
        whole = rope if rope.dim() == 2 else rope[..., min(int(head), rope.shape[-3] - 1), :, :]
        own = rows.view(2, 2)[place]
        assert torch.equal(found[..., place, :, :], torch.cat([whole[..., own], whole[..., own + 4]], -1))


def test_sizes_alike_keep_pairs_half_of_v():
    model, space = dense(HALVES)
    plan = allocate(random_scores(model, space=space), Budget(params=0.7), kinds=INNER_KINDS, uniform=True)
    assert plan.sizes["v.0"] == 2 * plan.sizes["qk.0"]


def test_a_file_says_what_pairs_are(tmp_path, refused):
    text = next(f for f in families() if f.file.stem == "eva").file.read_text()
    for old, new in (("qk: rope, blocks.0.attn.rotate_half", "qk: rope"), ("  qk: rope", "  hidden: rope")):
        file = tmp_path / "mine.yaml"
        file.write_text(text.replace(old, new))
        with refused("mine.yaml", "pairs has", "kind qk"):
            read_family(file)
