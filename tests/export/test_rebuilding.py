"""A checkpoint is written only if what rebuilds from it computes the same; a changed head or image size is kept."""

from functools import partial

import pytest
import timm
import torch
from backbones import PVT, SWIN, TIMM_BACKBONES, VIT_TINY, dense, random_plan, shake
from timm.layers import LayerNorm
from torch import nn

import sidt
from sidt.export.comparison import difference_between
from sidt.export.models import create_model, name_of
from sidt.space.trace import input_size_of
from sidt.surgery.slicing import slice_model

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "num_classes": 10, "depth": 1}


def created(name=NAME, **args):
    return shake(timm.create_model(name, **args)).eval()


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 6},
        {"act_layer": "relu"},
        {"global_pool": "avg", "fc_norm": False},
        {"patch_size": 8},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "dynamic_img_size": True},
        {"norm_layer": "rmsnorm"},
        {"init_values": 0.1, "no_embed_class": True},
    ],
    ids=str,
)
def test_what_a_model_was_created_with_need_not_be_given(change, tmp_path):
    model = created(**TINY, **change)
    sidt.save(model, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(sidt.load(tmp_path)(images), model(images))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 6}, ("blocks.0.attn.num_heads is 6", "3 when it is rebuilt")),
        ({"act_layer": "relu"}, ("blocks.0.mlp.act is ReLU", "GELU")),
        ({"global_pool": "avg", "fc_norm": False}, ("global_pool is 'avg'", "'token'")),
        ({"dynamic_img_size": True}, ("dynamic_img_size is True", "False")),
        ({"norm_layer": partial(LayerNorm, eps=1e-4)}, ("norm1.eps is 0.0001", "1e-06")),
        ({"qk_norm": True}, ("k_norm",)),
        ({"no_embed_class": True}, ("pos_embed",)),
    ],
    ids=str,
)
def test_arguments_that_compute_something_else_are_refused(change, says, tmp_path, refused):
    model = created(**TINY, **change)
    with refused("does not rebuild", "args=", *says):
        sidt.save(model, tmp_path / "a", args=TINY)
    assert not (tmp_path / "a").exists()


def test_windows_of_swin(tmp_path, refused):
    small = {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16, "img_size": 64, "num_classes": 3}
    model = created("swin_tiny_patch4_window7_224", window_size=4, always_partition=True, **small)
    with refused("does not rebuild", "layers.0", "when it is rebuilt"):
        sidt.save(model, tmp_path, args=small | {"window_size": 4})
    sidt.save(model, tmp_path)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(sidt.load(tmp_path)(images), model(images))


def test_what_was_changed_after_a_model_was_created(tmp_path, refused):
    changed = created(**TINY)
    changed.blocks[0].attn.scale *= 2  # not read by the fused kernel, but where that is off
    with refused("blocks.0.attn.scale"):
        sidt.save(changed, tmp_path)
    scaled = created(**TINY)
    scaled.norm.forward = lambda x: 2 * nn.LayerNorm.forward(scaled.norm, x)
    with refused("differs by up to"):
        sidt.save(scaled, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_matters_in_training_alone_is_no_difference(tmp_path):
    model = created(drop_path_rate=0.3, drop_rate=0.2, proj_drop_rate=0.1, patch_drop_rate=0.2, **TINY)
    model.train()
    model.head.eval()
    sidt.save(model, tmp_path, args=TINY)
    assert model.training and model.blocks[0].attn.training and not model.head.training
    assert torch.equal(sidt.load(tmp_path).head.weight, model.head.weight)


def test_the_comparison_sees_tensors_that_no_state_dict_has():
    one, other = SWIN.build(seed=0), SWIN.build(seed=0)
    assert difference_between(one, other) is None
    assert one.layers[1].blocks[1].attn_mask is not None
    other.layers[1].blocks[1].attn_mask = one.layers[1].blocks[1].attn_mask.flip(1)
    assert "differs by up to" in difference_between(one, other)


def test_arguments_that_are_no_json(tmp_path, refused):
    with refused("norm_layer", "JSON", "rmsnorm"):
        sidt.save(created(norm_layer=partial(LayerNorm, eps=1e-4), **TINY), tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_precision(tmp_path):
    model = created(**TINY).bfloat16()
    sidt.save(model, tmp_path)
    assert sidt.load(tmp_path).head.weight.equal(model.head.weight.float())


RESIZED = [b for b in TIMM_BACKBONES if b.name in (VIT_TINY.name, SWIN.name, PVT.name, "swinv2_tiny_window8_256")]


@pytest.mark.parametrize("backbone", [b for b in RESIZED if not b.label], ids=str)
@pytest.mark.parametrize("classes", [3, 0])
def test_a_sliced_model_with_another_head(backbone, classes, tmp_path):
    model, space = dense(backbone)
    small = slice_model(model, random_plan(space, 1))
    small.reset_classifier(classes)
    images = backbone.images()
    sidt.save(small, tmp_path)
    back = sidt.load(tmp_path)
    assert back.num_classes == classes and torch.equal(back(images), small(images))
    again = slice_model(back, random_plan(sidt.space_for(back, backbone.input_size), 2))
    sidt.save(again, tmp_path / "again")
    assert torch.equal(sidt.load(tmp_path / "again")(images), again(images))


@pytest.mark.parametrize("backbone", [b for b in RESIZED if not b.label and b.name != PVT.name], ids=str)
def test_a_sliced_model_of_another_image_size(backbone, tmp_path):
    model, space = dense(backbone)
    small = slice_model(model, random_plan(space, 1))
    side = 2 * space.trace.input_size[1]
    small.set_input_size((side, side))
    sidt.save(small, tmp_path)
    images = torch.randn(1, 3, side, side)
    assert torch.equal(sidt.load(tmp_path)(images), small(images))


def test_an_aligned_and_sliced_model_with_another_head_and_size(tmp_path):
    model, _ = dense(VIT_TINY)
    aligned, moments = sidt.align(model, sidt.measure_moments(model, [(VIT_TINY.images(8), torch.zeros(8))]))
    small = sidt.compensate(aligned, random_plan(moments.space.ordered(()), 0, kinds=("mlp", "qk")), moments)
    small.reset_classifier(3)
    small.set_input_size((96, 96))
    sidt.save(small, tmp_path)
    back = sidt.load(tmp_path)
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(back(images), small(images)) and back.sidt_rotated == small.sidt_rotated


def test_the_name_has_the_tag_where_it_is_not_the_usual_one():
    assert name_of(timm.create_model(NAME, depth=1)) == NAME
    tagged = f"{NAME}.augreg_in21k"
    assert name_of(timm.create_model(tagged, depth=1)) == tagged
    assert name_of(nn.Linear(2, 2)) is None


def test_timms_own_names_on_the_hub(tmp_path, refused):
    model = create_model(f"timm/{NAME}.augreg_in21k", TINY)
    assert (model.num_classes, model.pretrained_cfg["tag"]) == (10, "augreg_in21k")
    sidt.save(model, tmp_path, name=f"timm/{NAME}.augreg_in21k", args=TINY)
    assert sidt.load(tmp_path).pretrained_cfg["tag"] == "augreg_in21k"
    with refused("vit_enormous", "near it", "vit_"):
        create_model("timm/vit_enormous", {})
    with refused("resnet_enormous", "near it", "resnet"):
        create_model("someone/resnet_enormous", {})


def wraps():
    model = created(**TINY)
    return {
        "module": nn.DataParallel(model),
        "_orig_mod": torch.compile(model),
        "_orig_mod.module": torch.compile(nn.DataParallel(model)),
    }


@pytest.mark.parametrize("path", ["module", "_orig_mod", "_orig_mod.module"])
def test_a_wrapped_model_is_named_as_one(path, tmp_path, refused):
    wrapped = wraps()[path]
    with refused("wraps a model", f"model.{path}"):
        sidt.space_for(wrapped)
    with refused("wraps a model", f"model.{path}"):
        sidt.save(wrapped, tmp_path)
    assert sidt.space_for(wrapped.get_submodule(path)).model == "VisionTransformer"


def test_a_model_without_a_space_is_not_called_wrapped(refused):
    with refused("no search space", "DataParallel"):
        sidt.space_for(nn.DataParallel(nn.Linear(2, 2)))


def test_a_size_that_the_class_keeps_nowhere(tmp_path):
    """Hiera's: timm keeps what it was created with as two numbers."""
    for size in (64, (64, 64)):
        args = {"img_size": size, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
        sidt.save(create_model("hiera_tiny_224", args), tmp_path)
        assert input_size_of(sidt.load(tmp_path)) == (3, 64, 64)
