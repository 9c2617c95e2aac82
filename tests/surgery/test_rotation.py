"""The rotated width: the same function, units in order, a cut by an index that is a cut of directions."""

import numpy as np
import pytest
import torch
from backbones import BACKBONES, TIMM_BACKBONES, Backbone, random_plan, shake
from torch.testing import assert_close

import sidt
from sidt.importance.directions import directions, is_centred
from sidt.space.families import INNER_KINDS
from sidt.space.outputs import tensors_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.rotation import helmert_rows, rotatable, takes_mean
from sidt.surgery.slicing import slice_model

RMS = Backbone("vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "norm_layer": "rmsnorm"}, label="rmsnorm")
SCALED = Backbone("vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "init_values": 0.5}, label="scaled")
SWIN = {"depths": (1, 2, 1, 1), "img_size": 96, "embed_dim": 24, "num_heads": (2, 2, 2, 2)}
PADDED = Backbone("swin_tiny_patch4_window7_224", SWIN, label="padded")  # zeros beside the tokens in every stage
ALL = (*BACKBONES, RMS, SCALED, PADDED)
# timm's ViT without a norm or an embedding that changes the stream itself.
WHOLE = (
    *("vit_tiny", "deit", "dinov2", "beit", "cait", "eva", "dinov3", "rope", "relpos", "mci", "18x2", "dlittle"),
    *("parfac", "Classification"),
)


def rotated(backbone, images=4):
    """A shaken model in float64, its images, and it aligned with its moments."""
    model = shake(backbone.build()).double()
    batch = backbone.images(images).double()
    space = space_for(model, backbone.input_size)
    return model, batch, *sidt.align(model, sidt.measure_moments(model, [(batch, None)], space=space))


@torch.no_grad()
def outputs(model, batch):
    out = model(batch)
    return list(tensors_of(out))


@pytest.mark.parametrize("backbone", ALL, ids=str)
def test_the_aligned_model_computes_the_same(backbone):
    model, batch, aligned, moments = rotated(backbone)
    for seen, expected in zip(outputs(aligned, batch), outputs(model, batch), strict=True):
        assert float((seen - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    for seen, expected in zip(outputs(aligned.float(), batch.float()), outputs(model, batch), strict=True):
        assert float((seen - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    for name, parameter in model.named_parameters():
        assert aligned.get_parameter(name).shape == parameter.shape
    assert (
        moments.space.rotated() == space_for(aligned, backbone.input_size).rotated() == list(rotatable(moments.space))
    )


@pytest.mark.parametrize("backbone", ALL, ids=str)
def test_which_widths_can_be_rotated(backbone):
    space = space_for(backbone.build(), backbone.input_size)
    widths = {d.name for d in space.dimensions.values() if d.kind == "width"}
    assert set(space.streams) == widths
    if backbone.source == "timm" and backbone.name.startswith("swin_"):
        assert set(rotatable(space)) == widths - {"embed.0"} and "patch_embed.norm" in space.streams["embed.0"]
    elif "volo" in backbone.name:  # a convolution reads the first width as it is
        assert set(rotatable(space)) == {"embed"}
    elif backbone.name == "DetrForObjectDetection" and widths:  # of its Swin, whose last map alone is read
        assert set(rotatable(space)) == widths - {"embed.0", "embed.3"}
    elif space.family == "transformers_swin":
        out = {"SwinModel": {"embed.3"}, "SwinBackbone": {"embed.1", "embed.3"}}.get(backbone.name, set())
        assert set(rotatable(space)) == widths - {"embed.0"} - out and "embeddings.norm" in space.streams["embed.0"]
    else:
        whole = any(word in backbone.name for word in WHOLE) and not any(
            word in str(backbone) for word in ("avg", "Model", "Dinov2")
        )
        # It goes out beside its norm, and nothing reads the query through one.
        if "pooled" in widths and backbone.source == "timm":
            assert set(rotatable(space)) == ({"embed"} if space.family in ("vit", "naflexvit") else set())
            assert "attn_pool.norm" in space.streams["pooled"] and "attn_pool.q" in space.streams["latent"]
            return
        assert set(rotatable(space)) == (widths if whole else set())
        assert whole or all(isinstance(reason, str) and reason for reason in space.streams.values())


TINY = {"depth": 1, "img_size": 32, "num_classes": 0}
HEADLESS = (
    ("vit_tiny_patch16_224", TINY),
    ("vit_tiny_patch16_224", TINY | {"global_pool": ""}),
    ("vit_tiny_patch16_224", TINY | {"global_pool": "avg", "fc_norm": False}),  # its head reads the mean of the tokens
    ("deit_tiny_distilled_patch16_224", TINY),
    ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 64, "num_classes": 0}),
)


@pytest.mark.parametrize(("name", "kwargs"), HEADLESS)
def test_a_model_without_a_head_gives_the_same_features(name, kwargs, tmp_path):
    """The way back is in a head, of a model that timm builds; what is left of the width is refitted to the features."""
    model = shake(Backbone(name).create(**kwargs)).eval().double()
    assert "goes out of the model" in list(space_for(model).streams.values())[-1]
    batch = torch.randn(8, 3, kwargs["img_size"], kwargs["img_size"], dtype=torch.float64)
    aligned, moments = sidt.align(model, sidt.measure_moments(model, [(batch, None)]))
    features = outputs(model, batch)[0]
    assert float((outputs(aligned, batch)[0] - features).abs().max()) <= 1e-9 * float(features.abs().max())
    *_, width = moments.space.rotated()
    plan = DimensionPlan(moments.space, {width: np.arange(moments.space.sizes[width] // 2)})
    repaired = sidt.compensate(aligned, plan, moments)
    errors = [float((outputs(m, batch)[0] - features).norm()) for m in (slice_model(aligned, plan), repaired)]
    assert errors[1] < 0.1 * errors[0]
    repaired = repaired.float()
    sidt.save(repaired, tmp_path, name=name, args={**kwargs, "num_classes": features.shape[-1]})
    assert torch.equal(outputs(sidt.load(tmp_path), batch.float())[0], outputs(repaired, batch.float())[0])


OUT_OF_ORDER = (
    ("eva02_enormous_patch14_clip_224", {"img_size": 28, "embed_dim": 48, "num_heads": 4}, "stands behind"),
    ("vit_tiny_patch16_224", {"img_size": 32, "final_norm": False, "num_classes": 0}, "goes out of the model"),
)


@pytest.mark.parametrize(("name", "kwargs", "reason"), OUT_OF_ORDER)
def test_a_stream_that_its_norms_do_not_give_keeps_its_basis(name, kwargs, reason):
    """Norms of the same names after their layers, and features that no norm is the last of."""
    model = shake(Backbone(name).create(depth=2, **kwargs)).eval().double()
    batch = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"], dtype=torch.float64)
    aligned, moments = sidt.align(model, sidt.measure_moments(model, [(batch, None)]))
    assert reason in moments.space.streams["embed"]
    assert_close(outputs(aligned, batch)[0], outputs(model, batch)[0])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("classes", [0, 7])
def test_units_that_are_pooled_by_their_maximum_keep_their_basis(name, classes):
    kwargs = SWIN if name.startswith("swin") else {"depth": 1, "img_size": 96}
    model = Backbone(name).create(**kwargs, num_classes=classes, global_pool="avgmax").eval().double()
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    aligned, moments = sidt.align(model, sidt.measure_moments(model, [(images, None)]))
    expected = outputs(model, images)[0]
    assert float((outputs(aligned, images)[0] - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    *_, last = moments.space.streams
    assert last not in moments.space.rotated()
    assert "largest value" in moments.space.streams[last] or classes == 0


def test_features_that_no_head_can_give_keep_their_basis():
    """timm builds no Swin with a head and without pooling."""
    model = Backbone("swin_tiny_patch4_window7_224").create(**SWIN, num_classes=0, global_pool="").eval()
    images = torch.randn(2, 3, 96, 96)
    aligned, moments = sidt.align(model, sidt.measure_moments(model, [(images, None)]))
    assert aligned.num_classes == 0 and moments.space.rotated() == ["embed.1", "embed.2"]
    assert_close(outputs(aligned, images)[0], outputs(model, images)[0], rtol=1e-4, atol=1e-4)


def test_helmert():
    rows = helmert_rows(7)
    assert_close(rows.T @ rows, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-15)
    assert_close(rows.sum(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-15)
    for kept in range(2, 7):  # of the first units, the later directions are the same in all
        assert_close(rows[:kept, kept - 1 :], rows[:1, kept - 1 :].expand(kept, -1), rtol=0, atol=0)


def in_directions(size):
    """The orthogonal matrix from units behind a LayerNorm to their mean and their directions."""
    mean = torch.full((1, size), size**-0.5, dtype=torch.float64)
    return torch.cat([mean, helmert_rows(size).T])


def test_directions_are_a_product_with_helmert():
    units = torch.randn(2, 7, 3, dtype=torch.float64)
    assert_close(directions(units), in_directions(7) @ units, rtol=0, atol=1e-14)


def test_norms_are_asked_whether_they_take_the_mean():
    assert takes_mean(torch.nn.LayerNorm(6), 6) and not takes_mean(torch.nn.RMSNorm(6), 6)
    shifted = torch.nn.LayerNorm(6)
    torch.nn.init.normal_(shifted.bias)
    assert takes_mean(shifted, 6)


@pytest.mark.parametrize("backbone", [TIMM_BACKBONES[0], RMS], ids=str)
def test_a_cut_of_units_is_a_cut_of_directions(backbone):
    """The definition: the norm's input, projected on the first directions, normalised over the units that are left."""
    _, batch, aligned, moments = rotated(backbone)
    space, kept = moments.space, 70
    sliced = slice_model(aligned, DimensionPlan(space, {"embed": np.arange(kept)}))
    basis = in_directions(192) if is_centred(aligned, space, "embed") else None
    seen = []
    for model in (aligned, sliced):
        model.blocks[0].norm1.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
        outputs(model, batch)
    (stream, _), (_, out) = seen
    carried = stream if basis is None else (stream @ basis.T)[..., 1:]
    left = carried[..., : kept if basis is None else kept - 1]
    expected = left / left.square().sum(-1, keepdim=True).sqrt() * kept**0.5
    if basis is not None:
        expected = expected @ helmert_rows(kept).T
    assert_close(out, expected, rtol=1e-4, atol=1e-4)  # up to the norm's eps


@pytest.mark.parametrize("backbone", ALL, ids=str)
def test_the_repair_is_closer_than_the_slice(backbone):
    _, batch, aligned, moments = rotated(backbone, 8)
    space = moments.space
    for width in rotatable(space):
        plan = DimensionPlan(space, {width: np.arange(int(0.6 * space.sizes[width]))})
        sliced, repaired = slice_model(aligned, plan), sidt.compensate(aligned, plan, moments)
        dense = outputs(aligned, batch)  # all of them: a stage's width may not reach the first map
        errors = [
            sum(float((seen - wanted).norm()) for seen, wanted in zip(outputs(m, batch), dense, strict=True))
            for m in (sliced, repaired)
        ]
        assert errors[1] < 0.5 * errors[0]
        same = sidt.compensate(aligned, DimensionPlan(space, {}), moments)
        for name, tensor in aligned.state_dict().items():
            assert torch.equal(same.state_dict()[name], tensor)


def test_plans_of_a_rotated_width_keep_its_first_units(refused):
    _, _, _, moments = rotated(TIMM_BACKBONES[0])
    with refused("embed", "first"):
        DimensionPlan(moments.space, {"embed": np.arange(1, 60)})


@pytest.mark.parametrize("criterion", ["taylor", "random", "activation"])
def test_the_width_is_searched_by_default_where_it_is_rotated(criterion):
    model, batch, aligned, moments = rotated(SCALED)
    targets = torch.arange(len(batch))
    arguments = () if criterion == "random" else ([(batch, targets)],)
    scores = getattr(sidt.importance, criterion)(aligned, *arguments, space=moments.space)
    plan = sidt.allocate(scores, sidt.Budget(params=0.3))
    assert 2 <= plan.sizes["embed"] < plan.space.sizes["embed"]
    inner = sidt.allocate(scores, sidt.Budget(params=0.5), kinds=INNER_KINDS)
    assert inner.sizes["embed"] == inner.space.sizes["embed"]
    given = sidt.allocate(scores, sidt.Budget(params=0.3), sizes={"embed": 120})
    assert given.sizes["embed"] == 120
    plain = getattr(sidt.importance, criterion)(model, *arguments)
    assert sidt.allocate(plain, sidt.Budget(params=0.5)).sizes["embed"] == 192


def test_directions_are_scored_by_what_they_carry():
    """Taylor's score of a direction: of all that writes and reads it, and of nothing of the mean."""
    _, batch, aligned, moments = rotated(TIMM_BACKBONES[0])
    targets = torch.arange(len(batch))
    scores = sidt.importance.taylor(aligned, [(batch, targets)], space=moments.space).scores["embed"]
    basis = in_directions(192)
    aligned.zero_grad()
    torch.nn.functional.cross_entropy(aligned(batch), targets).backward()
    sums = torch.zeros(192, dtype=torch.float64)
    for name, at in rotatable(moments.space)["embed"].places.items():
        parameter = aligned.get_parameter(name)
        for dim in at:
            weight, grad = (t.movedim(dim, -1) @ basis.T for t in (parameter.detach(), parameter.grad))
            sums += (weight * grad).flatten(0, -2).sum(0) if weight.ndim > 1 else weight * grad
    assert_close(torch.from_numpy(scores), sums.square(), rtol=1e-6, atol=1e-12)


def test_a_rotated_model_is_saved_sliced_and_loaded(tmp_path):
    backbone = SCALED
    _, batch, aligned, moments = rotated(backbone)
    aligned = aligned.float()
    plan = DimensionPlan(moments.space, {**random_plan(moments.space, 0, INNER_KINDS).keep, "embed": np.arange(100)})
    small = sidt.compensate(aligned, plan, moments)
    args = {**backbone.kwargs, "num_classes": 10}
    sidt.save(small, tmp_path, name=backbone.name, args=args)
    back = sidt.load(tmp_path)
    assert torch.equal(outputs(back, batch.float())[0], outputs(small, batch.float())[0])
    assert space_for(back).rotated() == ["embed"]
    again, _ = sidt.align(back, sidt.measure_moments(back, [(batch.float(), None)]))
    assert_close(outputs(again, batch.float())[0], outputs(back, batch.float())[0], rtol=1e-3, atol=1e-3)


def test_a_model_that_was_trained_is_aligned_again(refused):
    _, _, aligned, moments = rotated(TIMM_BACKBONES[0])
    with torch.no_grad():
        aligned.blocks[0].norm2.weight += 0.1
    with refused("blocks.0.norm2", "align"):
        sidt.compensate(aligned, DimensionPlan(moments.space, {"embed": np.arange(90)}), moments)
