"""Surgery beyond what the conformance suite asks of every backbone: what is kept, shared, refused."""

import copy
import dataclasses
import os
import subprocess

import pytest
import timm
import torch
from backbones import (
    BACKBONES,
    MMDET_PVT,
    MMDET_SWIN,
    PVT,
    SWIN,
    SWIN_V2,
    VIT_TINY,
    dense,
    random_plan,
    shake,
    sublayers,
)
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torch.testing import assert_close

from sidt.space.axes import names
from sidt.space.families import INNER_KINDS, KINDS
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.slicing import mask_model, slice_model

TIMM = (VIT_TINY, SWIN, SWIN_V2, PVT)
ONE_OF_TIMM = pytest.mark.parametrize("backbone", TIMM, ids=str)
ONE_EACH = pytest.mark.parametrize("backbone", [*TIMM, MMDET_SWIN, MMDET_PVT], ids=str)


def attentions(model: nn.Module) -> list[nn.Module]:
    """timm's attentions, MMDetection's window attentions, and torch's within MMDetection's."""
    found = [m for name, m in model.named_modules() if name.endswith((".attn", ".w_msa"))]
    return [m for m in found if not any(child in found for child in m.children())]


@torch.no_grad()
def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits, or the last of the maps."""
    result = model(images)
    return result if isinstance(result, torch.Tensor) else result[-1]


def random_slice(backbone, kinds=KINDS):
    model, space = dense(backbone)
    return slice_model(model, random_plan(space, 0, kinds))


@ONE_EACH
@pytest.mark.parametrize("cut", [slice_model, mask_model])
def test_the_given_model_is_not_touched(backbone, cut):
    model = backbone.build()
    model.train()
    before = copy.deepcopy(model)
    result = cut(model, random_plan(space_for(model, backbone.input_size), 0))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert str(model) == str(before) and not hasattr(model, "sidt_plan")
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    assert not storages & {t.untyped_storage().data_ptr() for t in [*result.parameters(), *result.buffers()]}
    assert result.training and all(m.training for m in result.modules())


@ONE_EACH
def test_names_and_order_of_the_state_dict_stay(backbone):
    assert list(random_slice(backbone).state_dict()) == list(dense(backbone)[0].state_dict())


def test_the_attention_scale_is_that_of_the_dense_model():
    for backbone in (VIT_TINY, SWIN, PVT):
        scales = [
            (a.scale, b.scale)
            for a, b in zip(*map(attentions, (dense(backbone)[0], random_slice(backbone))), strict=True)
        ]
        assert all(before == after for before, after in scales)


def test_a_scale_of_the_new_size_would_be_wrong():
    model, space = dense(VIT_TINY)
    plan = random_plan(space, 0, ("qk",))
    sliced, masked, images = slice_model(model, plan), mask_model(model, plan), VIT_TINY.images()
    assert_close(run(sliced, images), run(masked, images), rtol=1e-5, atol=1e-5)
    for attention in attentions(sliced):
        attention.scale = attention.head_dim**-0.5
    assert (run(sliced, images) - run(masked, images)).abs().max() > 1e-3


@pytest.mark.parametrize("kinds", [("heads",), ("mlp",), ("width",), ("heads", "mlp", "width")], ids="-".join)
@pytest.mark.parametrize(("backbone", "plain"), [(VIT_TINY, Attention), (SWIN, WindowAttention)], ids=str)
def test_plain_timm_modules_stay_where_they_take_the_sizes(backbone, plain, kinds):
    sliced = random_slice(backbone, kinds)
    assert {type(m) for m in sliced.modules()} == {type(m) for m in dense(backbone)[0].modules()}
    assert {type(a) for a in attentions(sliced)} == {plain}


@ONE_EACH
def test_plain_modules_stay_for_the_mlp_everywhere(backbone):
    sliced, model = random_slice(backbone, ("mlp",)), dense(backbone)[0]
    assert [type(m) for m in sliced.modules()] == [type(m) for m in model.modules()]


@ONE_EACH
def test_other_attentions_add_nothing(backbone):
    for before, after in zip(*map(attentions, (dense(backbone)[0], random_slice(backbone, INNER_KINDS))), strict=True):
        assert type(after) is not type(before) and isinstance(after, type(before))
        assert [*after.state_dict()] == [*before.state_dict()]
        assert vars(after).keys() - vars(before).keys() <= {"scale"}  # torch's attention has none of its own


@ONE_EACH
def test_copies_and_casts(backbone):
    sliced, images = random_slice(backbone), backbone.images()
    expected = run(sliced, images)
    assert torch.equal(run(copy.deepcopy(sliced), images), expected)
    assert_close(run(copy.deepcopy(sliced).to(torch.float64), images.double()), expected.double(), rtol=1e-4, atol=1e-4)
    rounded = run(copy.deepcopy(sliced).to(torch.bfloat16), images.bfloat16())
    assert rounded.dtype == torch.bfloat16 and rounded.isfinite().all()
    assert (rounded.float() - expected).abs().max() < 0.1 * expected.abs().max()


@ONE_EACH
def test_autocast(backbone):
    sliced, images = random_slice(backbone), backbone.images()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(sliced, images)
    assert (mixed.float() - run(sliced, images)).abs().max() < 0.1 * mixed.abs().max()


def test_a_half_precision_model_is_sliced_in_its_own_type():
    model = VIT_TINY.build().half()
    sliced = slice_model(model, random_plan(space_for(model), 0))
    assert {p.dtype for p in sliced.parameters()} == {torch.float16}


def test_attributes_follow_the_vit():
    model, space = dense(VIT_TINY)
    plan = DimensionPlan(space, {"embed": range(100), "heads.1": [0, 2], "qk.1": [range(5)] * 2, "v.1": [range(9)] * 2})
    sliced = slice_model(model, plan)
    first, second = attentions(sliced)
    assert [first.num_heads, first.head_dim, first.attn_dim] == [3, 64, 192]
    assert [second.num_heads, second.head_dim, second.attn_dim] == [2, 5, 18]
    assert sliced.embed_dim == sliced.num_features == sliced.head_hidden_size == 100
    assert sliced.feature_info[1]["num_chs"] == 100 and model.feature_info[1]["num_chs"] == 192
    assert (second.qkv.in_features, second.qkv.out_features) == (100, 2 * (5 + 5 + 9))
    assert (second.proj.in_features, second.proj.out_features) == (18, 100)
    assert sliced.norm.normalized_shape == (100,) and sliced.patch_embed.proj.out_channels == 100


@ONE_EACH
def test_every_layer_says_its_true_size(backbone):
    for module in random_slice(backbone).modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == module.weight.shape


@ONE_OF_TIMM
def test_heads_and_features_of_the_sliced_model(backbone):
    sliced, images = random_slice(backbone), backbone.images()
    sizes = sliced.sidt_plan.sizes
    widths = [s for n, s in sizes.items() if n.startswith("embed")]
    final, intermediates = sliced.forward_intermediates(images)
    assert sliced.num_features == widths[-1] in final.shape
    channels = [f.shape[1] for f in intermediates]
    assert channels == [info["num_chs"] for info in sliced.feature_info]
    assert channels == (widths if len(widths) > 1 else widths * len(channels))
    assert torch.equal(sliced.forward_head(sliced.forward_features(images)), sliced(images))
    fresh = copy.deepcopy(sliced)
    fresh.reset_classifier(7)
    assert run(fresh, images).shape == (2, 7)


def test_an_attention_of_an_unknown_class(refused):
    class Mine(Attention):
        pass

    model = VIT_TINY.build()
    space = space_for(model)
    model.blocks[1].attn.__class__ = Mine
    with refused("Mine", "forwards", "mlp and width"):
        slice_model(model, random_plan(space, 0, ("heads",)))
    sliced = slice_model(model, random_plan(space, 0, ("mlp", "width")))  # as the message says
    assert type(sliced.blocks[1].attn) is Mine and run(sliced, VIT_TINY.images()).isfinite().all()


@ONE_EACH
def test_a_block_without_heads_and_hidden_units_multiplies_nothing(backbone):
    model, space = dense(backbone)
    gone = sublayers(space, "together")
    sliced = slice_model(model, random_plan(space, 0, empty=gone))
    block = next(p.block for p in space.places.values() if any(gone & names(axis) for axis in p.axes))
    before, after = (space_for(m, backbone.input_size).trace.module_macs[block] for m in (model, sliced))
    assert before > after == 0
    entries = {n: p.numel() for n, p in sliced.named_parameters() if n.startswith(f"{block}.") and p.numel()}
    assert len(entries) == 6, "two norms and two output biases"
    assert len({space.places[n].axes for n in entries}) == 1, "each of the width"
    assert all(p.requires_grad == bool(p.numel()) for p in sliced.parameters())


@ONE_OF_TIMM
def test_an_empty_sublayer_gives_its_output_bias(backbone):
    model, space = dense(backbone)
    sliced = slice_model(model, random_plan(space, 0, empty=sublayers(space, "together")))
    outputs = {}
    for name, module in sliced.named_modules():
        if name.endswith((".attn", ".mlp")):
            module.register_forward_hook(lambda m, _, out: outputs.update({m: out}))
    run(sliced, backbone.images())
    gone = [(m, out) for m, out in outputs.items() if not (m.proj if hasattr(m, "proj") else m.fc2).in_features]
    assert len(gone) == 2
    for module, out in gone:
        bias = (module.proj if hasattr(module, "proj") else module.fc2).bias
        assert torch.equal(out, bias.expand_as(out)) and bias.abs().min() > 0


def test_an_mlp_of_an_unknown_class_with_convolutions(refused):
    model, space = PVT.build(), dense(PVT)[1]
    mlp = model.stages[1].blocks[0].mlp
    mlp.__class__ = type("Mine", (type(mlp),), {})
    slice_model(model, random_plan(space, 0, ("mlp",)))
    with refused("hidden.1.0", "Mine", "sidt/surgery/attention.py", "min_units=1"):
        slice_model(model, random_plan(space, 0, ("mlp",), empty={"hidden.1.0"}))


def test_a_module_without_forwards(refused):
    model, space = dense(VIT_TINY)
    plan = random_plan(space, 0)
    for name, words in {"no_such_module": "No module named 'no_such_module'", "sidt.errors": "FORWARDS"}.items():
        other = DimensionPlan(dataclasses.replace(space, forwards=name), plan.keep)
        with refused("attention forwards", words):
            slice_model(model, other)


def test_an_attention_of_mmdetection_of_an_unknown_class(refused):
    model, space = MMDET_SWIN.build(), dense(MMDET_SWIN)[1]
    attention = model.stages[0].blocks[0].attn.w_msa
    attention.__class__ = type("Mine", (type(attention),), {})
    with refused("Mine", "detection/detectors/attention.py", "mlp and width"):
        slice_model(model, random_plan(space, 0, ("heads",)))


@pytest.mark.parametrize("cut", [slice_model, mask_model])
def test_a_plan_for_another_model(cut, refused):
    plan = random_plan(dense(VIT_TINY)[1], 0)
    with refused("another model", "cls_token", "[1, 1, 384]", "[1, 1, 192]"):
        cut(dense(BACKBONES[3])[0], plan)
    with refused("another model", "cls_token", "not in the model"):
        cut(dense(SWIN)[0], plan)
    with refused("another model"):
        cut(slice_model(dense(VIT_TINY)[0], plan), plan)


def test_what_is_frozen_stays_frozen():
    model = VIT_TINY.build()
    model.requires_grad_(False)
    model.blocks[0].mlp.requires_grad_(True)
    sliced = slice_model(model, random_plan(space_for(model), 0))
    assert [p.requires_grad for p in sliced.parameters()] == [p.requires_grad for p in model.parameters()]


@ONE_EACH
def test_dropout_of_attention_weights(backbone):
    model = shake(backbone.create(**backbone.kwargs, attn_drop_rate=0.5, drop_path_rate=0.0))
    sliced, images = slice_model(model, random_plan(space_for(model, backbone.input_size), 0)), backbone.images(1)
    sliced.train()
    assert not torch.equal(run(sliced, images), run(sliced, images))
    outputs = sliced(images)
    sum(y.square().sum() for y in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)).backward()
    assert all(p.grad.isfinite().all() for p in sliced.parameters())
    sliced.eval()
    assert torch.equal(run(sliced, images), run(sliced, images))


def compiled_is_eager(sliced: nn.Module, images: torch.Tensor, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(sliced, backend=backend, fullgraph=True)
    assert_close(run(compiled, images), run(sliced, images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@ONE_EACH
def test_it_is_captured_by_torch_compile(backbone):
    compiled_is_eager(random_slice(backbone), backbone.images(), "eager")


def compiles() -> bool:
    """Whether the C++ compiler that torch.compile calls is there."""
    try:
        return not subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True).returncode
    except OSError:
        return False


@pytest.mark.slow  # the compiler runs for a minute
@pytest.mark.skipif(not compiles(), reason="torch.compile's inductor calls a C++ compiler, and there is none here")
def test_it_is_compiled_by_torch_compile():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=10).eval()
    sliced = slice_model(model, random_plan(space_for(model), 0))
    compiled_is_eager(sliced, torch.randn(2, 3, 32, 32), "inductor")
