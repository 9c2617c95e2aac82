"""The spaces of MMDetection's own backbones against timm's: with the same weights, one plan is one and the same cut.

The order of weights in the two libraries is written out here. MMDetection's ``swin_converter`` and ``pvt_convert``
do the same for the original checkpoints.
"""

import re
from functools import cache

import numpy as np
import pytest
import timm
import torch
from backbones import MMDET_PVT, MMDET_SWIN, Backbone, dense, random_plan, shake
from mmdet.models.backbones import PyramidVisionTransformerV2, SwinTransformer
from mmdet.models.backbones.swin import WindowMSA, swin_converter
from torch import nn
from torch.testing import assert_close

from sidt import importance
from sidt.space.families import KINDS
from sidt.space.plan import DimensionPlan, plan_from_json
from sidt.space.space import DimensionSpace, space_for
from sidt.surgery.slicing import slice_model

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SWIN_SIZE, PVT_SIZE = (3, 64, 96), (3, 70, 90)


def by_channel(columns: torch.Tensor) -> torch.Tensor:
    """PatchMerging's columns, [..., 4 C]: from timm's (w, h, C) to nn.Unfold's (C, h, w)."""
    return columns.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3)


def mmdet_swin(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A timm Swin's weights under MMDetection's names."""
    ours = {}
    for name, tensor in state.items():
        if match := re.match(r"layers\.(\d)\.downsample\.(.*)", name):  # timm's comes before the stage
            ours[f"stages.{int(match[1]) - 1}.downsample.{match[2]}"] = by_channel(tensor)
        elif not name.startswith("head."):
            for old, new in {"layers.": "stages.", "attn.": "attn.w_msa.", "mlp.fc1.": "ffn.layers.0.0."}.items():
                name = name.replace(old, new, 1)
            name = name.replace("mlp.fc2.", "ffn.layers.1.").replace("embed.proj.", "embed.projection.")
            ours[re.sub(r"^norm\.", "norm3.", name)] = tensor
    return ours


def mmdet_pvt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A timm PVT v2's weights under MMDetection's names."""
    ours = {}
    for name, tensor in state.items():
        if name.startswith("head.") or ".attn.kv." in name:
            continue
        if ".attn.q." in name:
            tensor = torch.cat([tensor, state[name.replace(".q.", ".kv.")]])
        name = re.sub(r"^patch_embed\.", "stages.0.downsample.", name)
        for pattern, new in (
            (r"^stages\.(\d)\.downsample\.", r"layers.\1.0."),
            (r"^stages\.(\d)\.blocks\.", r"layers.\1.1."),
            (r"^stages\.(\d)\.norm\.", r"layers.\1.2."),
            (r"\.0\.proj\.", ".0.projection."),
            (r"\.attn\.q\.", ".attn.attn.in_proj_"),
            (r"\.attn\.proj\.", ".attn.attn.out_proj."),
            (r"\.mlp\.fc1\.", ".ffn.layers.0."),
            (r"\.mlp\.dwconv\.", ".ffn.layers.1."),
            (r"\.mlp\.fc2\.", ".ffn.layers.4."),
        ):
            name = re.sub(pattern, new, name)
        ours[name] = tensor[..., None, None] if re.search(r"ffn\.layers\.[04]\.weight", name) else tensor
    return ours


def swins(out_indices=(0, 1, 2, 3)) -> tuple[nn.Module, nn.Module]:
    """timm's and MMDetection's Swin with the same weights. Window 2: neither library pads a shifted window."""
    small = {"depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4), "window_size": 2}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", img_size=SWIN_SIZE[1:], embed_dim=24, **small)
    ours = SwinTransformer(embed_dims=24, out_indices=out_indices, **small)
    for model in (theirs, ours):
        shake(model).eval()
    lost = ours.load_state_dict(mmdet_swin(theirs.state_dict()), strict=False)
    kept = {f"norm{stage}.{leaf}" for stage in out_indices if stage < 3 for leaf in ("weight", "bias")}
    assert {n for n in lost.missing_keys if "position_index" not in n} == kept and not lost.unexpected_keys
    return theirs, ours


def pvts() -> tuple[nn.Module, nn.Module]:
    """timm's and MMDetection's PVT v2 with the same weights and one epsilon."""
    theirs = timm.create_model("pvt_v2_b0", depths=(1, 1, 2, 1), embed_dims=(8, 16, 40, 64))
    ours = PyramidVisionTransformerV2(embed_dims=8, num_layers=(1, 1, 2, 1))
    for model in (theirs, ours):
        shake(model).eval()
    ours.load_state_dict(mmdet_pvt(theirs.state_dict()), strict=True)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return theirs, ours


@torch.no_grad()
def maps_of_timm(theirs: nn.Module, ours: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """timm's map of each stage; Swin's go through MMDetection's norms, which timm has not."""
    maps = theirs.forward_intermediates(images, intermediates_only=True)
    if isinstance(ours, SwinTransformer):
        norms = [ours.get_submodule(f"norm{stage}") for stage in range(4)]
        maps = [norm(y.movedim(1, -1)).movedim(-1, 1) for norm, y in zip(norms, maps, strict=True)]
    return maps


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module, DimensionSpace, DimensionSpace, torch.Tensor]:
    torch.manual_seed(0)
    (theirs, ours), size = (swins(), SWIN_SIZE) if name == "swin" else (pvts(), PVT_SIZE)
    return theirs, ours, space_for(theirs, size), space_for(ours, size), torch.randn(2, *size)


BOTH = pytest.mark.parametrize("name", ["swin", "pvt"])


@BOTH
def test_the_dimensions_are_those_of_timm(name):
    _, _, theirs, ours, _ = pair(name)
    assert ours.dimensions == theirs.dimensions and list(ours.dimensions) == list(theirs.dimensions)
    assert ours.model in ("SwinTransformer", "PyramidVisionTransformerV2") and ours.family.startswith("mmdet_")


@BOTH
def test_dense_models_with_the_same_weights_agree(name):
    theirs, ours, _, _, images = pair(name)
    with torch.no_grad():
        assert_close(ours(images), maps_of_timm(theirs, ours, images), **TOLERANCE)


@BOTH
@pytest.mark.parametrize("kinds", [KINDS, *((kind,) for kind in KINDS if kind != "channels")], ids="-".join)
def test_one_plan_makes_the_same_cut(name, kinds):
    theirs, ours, their_space, our_space, images = pair(name)
    plan = random_plan(their_space, 3, kinds)
    same_plan = plan_from_json(plan.to_json(), our_space)  # as a plan that was saved for the one is read for the other
    small_theirs, small_ours = slice_model(theirs, plan), slice_model(ours, same_plan)
    with torch.no_grad():
        result, expected = small_ours(images), maps_of_timm(small_theirs, small_ours, images)
    assert_close(result, expected, **TOLERANCE)
    whole = maps_of_timm(theirs, ours, images)
    assert result[3].shape != whole[3].shape or (result[3] - whole[3]).abs().max() > 1e-2


def test_the_columns_of_patch_merging_are_in_the_order_of_mmdetections_converter():
    """Microsoft's columns are timm's, and MMDetection says how it reads those."""
    norm, reduction = torch.randn(12), torch.randn(5, 12)
    given = {"layers.0.downsample.norm.weight": norm, "layers.0.downsample.reduction.weight": reduction}
    converted = swin_converter(given)
    assert torch.equal(converted["backbone.stages.0.downsample.norm.weight"], by_channel(norm))
    assert torch.equal(converted["backbone.stages.0.downsample.reduction.weight"], by_channel(reduction))


@pytest.mark.parametrize("criterion", [importance.taylor, importance.fisher], ids=lambda c: c.__name__)
def test_importance_of_every_unit_is_that_of_timm(criterion):
    torch.manual_seed(0)
    theirs, ours = (model.double() for model in swins(out_indices=(3,)))
    batch, direction = (torch.randn(4, *SWIN_SIZE).double(), torch.arange(4)), torch.randn(192, 2, 3)

    def loss(model, part):
        out = model(part[0])[0] if model is ours else model.forward_features(part[0]).movedim(-1, 1)
        return (out * direction).square().mean()

    scores = [criterion(m, [batch], loss, space=space_for(m, SWIN_SIZE)).scores for m in (theirs, ours)]
    for name in scores[0]:
        assert scores[1][name].std() > 0 or scores[1][name].size == 1
        np.testing.assert_allclose(scores[1][name], scores[0][name], rtol=1e-6)


@BOTH
def test_magnitude_of_every_unit_is_that_of_timm(name):
    theirs, ours, their_space, our_space, _ = pair(name)
    mine = importance.magnitude(ours, space=our_space).scores
    for unit, scores in importance.magnitude(theirs, space=their_space).scores.items():
        if not unit.startswith("embed") or (name == "pvt" and unit != "embed.3"):  # what else reads a width differs
            np.testing.assert_allclose(mine[unit], scores, rtol=1e-5)


@pytest.mark.parametrize("name", ["swin", "pvt"])
def test_activation_is_that_of_timms(name):
    """Torch's MultiheadAttention, which PVT has, hides its layers and packs q, k and v; timm's has them apart."""
    theirs, ours, their_space, our_space, images = pair(name)
    batches = [(images, torch.zeros(2))]
    mine = importance.activation(ours, batches, space=our_space).scores
    for unit, scores in importance.activation(theirs, batches, space=their_space).scores.items():
        if not unit.startswith("embed") or (name == "swin" and unit != "embed.3"):  # what else reads a width differs
            np.testing.assert_allclose(mine[unit], scores, rtol=1e-4, err_msg=unit)


def test_rows_of_a_packed_projection_have_their_own_positions():
    """q is taken at every token, k and v at those that the spatial reduction leaves, dense and sliced."""
    model, space = dense(MMDET_PVT)  # 86 x 70: 22 x 18 patches, of which a convolution of stride 8 leaves 2 x 2
    weight = "layers.0.1.0.attn.attn.in_proj_weight"
    assert set(space.trace.positions[weight]) == {(0, 8, 22 * 18), (8, 16, 4), (16, 24, 4)}
    assert space.trace.positions["layers.0.1.0.attn.attn.out_proj.weight"] == ((0, 8, 22 * 18),)
    last = space.trace.positions["layers.3.1.0.attn.attn.in_proj_weight"]
    assert {positions for _, _, positions in last} == {3 * 3}
    sliced = slice_model(model, DimensionPlan(space, {"qk.0.0": [[1, 4, 6]], "v.0.0": [[0, 2, 3, 5, 7]]}))
    positions = space_for(sliced, MMDET_PVT.input_size).trace.positions
    assert set(positions[weight]) == {(0, 3, 22 * 18), (3, 6, 4), (6, 11, 4)}


def test_attributes_follow_the_swin():
    model, space = dense(MMDET_SWIN)
    plan = random_plan(space, 0)
    sliced, sizes = slice_model(model, plan), plan.sizes
    widths = [sizes[f"embed.{stage}"] for stage in range(4)]
    assert sliced.num_features == widths and model.num_features == [24, 48, 96, 192]
    assert sliced.patch_embed.embed_dims == widths[0]
    for stage, part in enumerate(sliced.stages):
        if stage < 3:
            assert (part.downsample.in_channels, part.downsample.out_channels) == tuple(widths[stage : stage + 2])
        for index, block in enumerate(part.blocks):
            assert block.attn.w_msa.embed_dims == block.ffn.embed_dims == widths[stage]
            assert block.attn.w_msa.num_heads == sizes[f"heads.{stage}.{index}"]
            assert block.ffn.feedforward_channels == sizes[f"hidden.{stage}.{index}"]


def test_attributes_follow_the_pvt():
    model, space = dense(MMDET_PVT)
    plan = random_plan(space, 0)
    sliced, sizes = slice_model(model, plan), plan.sizes
    for stage, (patch_embed, blocks, _) in enumerate(sliced.layers):
        width = sizes[f"embed.{stage}"]
        assert patch_embed.embed_dims == width
        for index, block in enumerate(blocks):
            inner = block.attn.attn
            assert {block.attn.embed_dims, inner.embed_dim, inner.kdim, inner.vdim, block.ffn.embed_dims} == {width}
            assert block.attn.num_heads == inner.num_heads == sizes[f"heads.{stage}.{index}"]
            assert inner.head_dim == sizes[f"qk.{stage}.{index}"]
            assert inner.scale == 8**-0.5
            assert block.ffn.feedforward_channels == sizes[f"hidden.{stage}.{index}"]


@pytest.mark.parametrize(("backbone", "plain"), [(MMDET_SWIN, WindowMSA), (MMDET_PVT, nn.MultiheadAttention)], ids=str)
def test_plain_forwards_stay_only_where_heads_of_one_size_fill_the_width(backbone: Backbone, plain):
    model, space = dense(backbone)

    def classes(sliced):
        return {type(sliced.get_submodule(owner)) for owner in space.attention.values()}

    assert classes(model) == classes(slice_model(model, random_plan(space, 0, ("mlp",)))) == {plain}
    for kind in ("width", "heads", "qk", "v"):
        assert any(c is not plain for c in classes(slice_model(model, random_plan(space, 0, (kind,))))), kind


def test_torchs_own_forward_would_take_another_scale():
    """Sizes that torch's forward runs on, heads of 4 that fill a width of 8, but with the scale of 4, not of 8."""
    model, space = dense(MMDET_PVT)
    halves = {f"{n}.1.0": [[0, 2, 4, 6], [1, 3, 5, 7]] for n in ("qk", "v")}
    sliced = slice_model(model, DimensionPlan(space, {"embed.1": range(8)} | halves))
    attention = sliced.layers[1][1][0].attn.attn
    query = torch.randn(5, 1, 8)
    ours = attention(query, query, query)[0]
    assert attention.scale == 8**-0.5
    attention.scale = 4**-0.5
    rescaled = attention(query, query, query)[0]
    attention.__class__ = nn.MultiheadAttention
    plain = attention(query, query, query)[0]
    assert_close(plain, rescaled, **TOLERANCE)
    assert (ours - plain).abs().max() > 1e-3
