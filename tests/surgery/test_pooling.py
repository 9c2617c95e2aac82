"""Pooling by the attention of a learned query, as in SigLIP: widths of its own, and what timm does with it later."""

import numpy as np
import pytest
import timm
import torch
from backbones import random_plan, shake
from timm.layers.attention_pool import AttentionPoolLatent

import sidt
from sidt.surgery.attention import SlicedLatentPool

KWARGS = {"depth": 2, "img_size": 64, "embed_dim": 48, "num_heads": 4}
NAME = "vit_base_patch16_siglip_224"
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[0, 7])
def model(request):
    torch.manual_seed(0)
    return shake(timm.create_model(NAME, num_classes=request.param, **KWARGS)).eval()


def test_a_pool_without_heads_does_not_see_the_image(model):
    space = sidt.space_for(model)
    none = {"pool_heads": [], "pool_qk": np.empty((0, 3), dtype=int), "pool_v": np.empty((0, 5), dtype=int)}
    first, second = sidt.slice_model(model, sidt.DimensionPlan(space, none))(IMAGES)
    assert torch.equal(first, second) and first.isfinite().all()


def test_the_plain_pool_stays_where_it_takes_the_sizes(model):
    space = sidt.space_for(model)
    kept = sidt.slice_model(model, sidt.DimensionPlan(space, {"pool_hidden": [0, 1], "pooled": range(20)}))
    assert type(kept.attn_pool) is AttentionPoolLatent
    fewer = sidt.slice_model(
        model, sidt.DimensionPlan(space, {"embed": range(40)})
    )  # it takes its width for its heads'
    assert type(fewer.attn_pool) is SlicedLatentPool
    assert fewer.attn_pool.scale == model.attn_pool.scale


def test_a_sliced_model_gets_another_head(model):
    plan = random_plan(sidt.space_for(model), 0)
    small = sidt.slice_model(model, plan)
    assert plan.sizes["pooled"] != plan.sizes["embed"]
    assert small.num_features == small.head_hidden_size == plan.sizes["pooled"]
    assert small.forward_features(IMAGES).shape[-1] == plan.sizes["embed"] == small.feature_info[0]["num_chs"]
    small.reset_classifier(5)
    assert small(IMAGES).shape == (2, 5)


def test_the_width_before_the_pool_shrinks_by_its_directions(model):
    """Half of the width goes with little loss where it is rotated first: few directions carry these images."""
    batch = torch.randn(16, 3, 64, 64, dtype=torch.float64)
    model = model.double()
    aligned, moments = sidt.align(model, sidt.measure_moments(model, [(batch, None)]))
    assert moments.space.rotated() == ["embed"]
    small = sidt.compensate(aligned, sidt.DimensionPlan(moments.space, {"embed": np.arange(24)}), moments)
    plain = sidt.slice_model(model, sidt.DimensionPlan(sidt.space_for(model), {"embed": np.arange(24)}))
    with torch.no_grad():
        expected = model(batch)
        assert float((aligned(batch) - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
        errors = [float((m(batch) - expected).norm()) for m in (small, plain)]
    assert errors[0] < 0.5 * errors[1]
