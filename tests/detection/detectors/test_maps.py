"""The maps of timm's backbones in MMDetection: channels, sizes, slices of them, and what gives none of any size."""

import pytest
import torch
from backbones import SWIN, SWIN_V2, TIMM_BACKBONES, dense, random_plan
from maps import built, check_last_map, images
from mmdet.utils import register_all_modules
from timm.layers.norm import LayerNorm2d
from torch import nn

from sidt.detection.detectors.backbones import TimmBackbone, map_dimensions, searchable, slice_backbone
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for

# timm's own take no images of other sizes, or give maps of other sizes than they say.
NOT_OF_DETECTORS = (
    *("vitamin", "naflexvit", "samvit_base_patch16-", "hiera", "vit_relpos", "vit_srelpos"),
    *("beit_", "beitv2", "cait", "crossvit", "volo", "test_", "mvitv2", "pit_"),
)
READ_OTHERS = ("xcit", "qwen3_vit_88m_merge", "deepseek_vit_412m_align")
REFUSED = [b for b in TIMM_BACKBONES if f"{b}-".startswith(NOT_OF_DETECTORS)]
FAMILIES = [b for b in TIMM_BACKBONES if b not in REFUSED and b.label != "gated"]  # which no timm name has
SIZES = ((64, 64), (96, 64), (97, 130))


@pytest.fixture(autouse=True, scope="module")
def mmdet_scope():
    register_all_modules(init_default_scope=True)


@pytest.mark.parametrize("backbone", REFUSED, ids=str)
def test_a_backbone_of_one_size_is_refused(backbone, refused):
    with refused("timm's", "use a ViT, Swin"):
        built(backbone)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_maps_have_the_channels_and_sizes_that_are_said(backbone):
    module = built(backbone)
    for height, width in SIZES:
        maps = module(images(height, width))
        seen = [tuple(m.shape[1:]) for m in maps]
        stated = zip(module.out_channels, module.strides, strict=True)
        if backbone.name.startswith(("twins", "vit_tiny_r_s16", "vit_base_mci")):  # which leave out parts of patches
            assert seen == [(c, height // s, width // s) for c, s in stated]
        else:
            assert seen == [(c, -(-height // s), -(-width // s)) for c, s in stated]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_every_parameter_is_used_and_in_the_space(backbone):
    module = built(backbone)
    sum((m * torch.randn_like(m)).sum() for m in module(images(96, 64))).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []
    prefix, inner = searchable(module)
    assert prefix == "model." and inner is module.model
    assert set(space_for(inner, backbone.input_size).places) >= {name for name, _ in inner.named_parameters()}


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_a_slice_has_the_maps_of_its_plan(backbone):
    module = built(backbone)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    space = space_for(module.model, backbone.input_size)
    plan = random_plan(space, 3)
    sliced = slice_backbone(module, plan)
    names = map_dimensions(module, space)
    assert sliced.out_channels == tuple(plan.sizes[name] for name in names) != module.out_channels
    assert module.out_channels == tuple(space.sizes[name] for name in names)
    assert [m.shape[1] for m in sliced(images(97, 130))] == list(sliced.out_channels)
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    assert same(slice_backbone(module, DimensionPlan(space, {})), module)


@pytest.mark.parametrize("backbone", (SWIN, SWIN_V2), ids=str)
def test_a_sliced_width_takes_the_norms_along(backbone):
    module = built(backbone)
    space = space_for(module.model)
    plan = random_plan(space, 0, kinds=("width",))
    sliced = slice_backbone(module, plan)
    for stage, (norm, small) in enumerate(zip(module.norms, sliced.norms, strict=True)):
        kept = torch.from_numpy(plan.keep[f"embed.{stage}"])
        assert torch.equal(small.weight, norm.weight[kept]) and torch.equal(small.bias, norm.bias[kept])
    trunk = sliced.model.forward_intermediates(images(112, 112), intermediates_only=True)
    for norm, inner, seen in zip(sliced.norms, trunk, sliced(images(112, 112)), strict=True):
        wanted = nn.functional.layer_norm(inner.movedim(1, -1), (inner.shape[1],), norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(seen, wanted.movedim(-1, 1))


# XCiT's classifier reads a token that the last blocks make, and these read what goes to a language model.
@pytest.mark.parametrize("backbone", [b for b in FAMILIES if not f"{b}-".startswith(READ_OTHERS)], ids=str)
def test_the_last_map_is_what_the_classifier_pools(backbone):
    """At the size that the model was built for, with timm's own ``forward_features`` as the reference."""
    model = dense(backbone)[0]
    module = TimmBackbone(backbone.name, args=backbone.kwargs | {"num_classes": 10})
    module.model.load_state_dict(model.state_dict(), strict=False)
    if any(isinstance(norm, LayerNorm2d) for norm in module.norms):
        module.norms[-1].load_state_dict(getattr(model, "norm", getattr(model, "norm_pre", None)).state_dict())
    if "fc_norm.weight" in model.state_dict():
        module.model.norm.load_state_dict(model.fc_norm.state_dict())
    check_last_map(module.eval(), model, backbone.images())
