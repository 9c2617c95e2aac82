"""timm's backbones in MMDetection: maps, channels, weights that stay, and slices."""

import json

import pytest
import torch
from backbones import (
    DISTILLED,
    MMDET_BACKBONES,
    MMDET_SWIN,
    PVT,
    SWIN,
    SWIN_V2,
    VIT_TINY,
    Backbone,
    dense,
    random_plan,
    shake,
    sublayers,
)
from maps import BEIT_3, FOUR, built, check_last_map, images
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from timm.models.resnet import ResNet
from torch import nn

import sidt
import sidt.detection.models  # registers the backbones and the neck
from sidt.detection.detectors.backbones import TimmBackbone, map_dimensions, searchable, slice_backbone, sliced_backbone
from sidt.space.space import space_for


@pytest.fixture(autouse=True, scope="module")
def mmdet_scope():
    register_all_modules(init_default_scope=True)


def detector(backbone, neck, channels=16, strides=(8, 16, 32)):
    """A small RetinaNet with the given backbone and neck configs."""
    head = {
        "type": "RetinaHead",
        "num_classes": 3,
        "in_channels": channels,
        "feat_channels": channels,
        "stacked_convs": 1,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "octave_base_scale": 4,
            "scales_per_octave": 1,
            "ratios": [1.0],
            "strides": list(strides),
        },
    }
    assigner = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0}
    test_cfg = {"nms_pre": 50, "score_thr": 0.0, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 10}
    return MODELS.build(
        ConfigDict(
            type="RetinaNet",
            backbone=backbone,
            neck=neck,
            bbox_head=head,
            train_cfg={"assigner": assigner, "allowed_border": -1, "pos_weight": -1, "debug": False},
            test_cfg=test_cfg,
        )
    )


def samples(height, width):
    found = []
    for _ in range(2):
        sample = DetDataSample(metainfo={"img_shape": (height, width), "batch_input_shape": (height, width)})
        sample.set_metainfo({"ori_shape": (height, width), "pad_shape": (height, width), "scale_factor": (1.0, 1.0)})
        boxes = torch.tensor([[4.0, 4.0, 40.0, 36.0], [20.0, 24.0, 60.0, 60.0]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
        found.append(sample)
    return found


def loss(model, height=64, width=64):
    parts = model.loss(images(height, width), samples(height, width))
    return sum(part.sum() for value in parts.values() for part in (value if isinstance(value, list) else [value]))


def vit_neck(channels=192, num_outs=3):
    return {
        "type": "SimpleFeaturePyramid",
        "in_channels": channels,
        "hidden_channels": 24,
        "out_channels": 16,
        "scales": (2, 1, 0.5),
        "num_outs": num_outs,
    }


def config(backbone: Backbone, **kwargs):
    return {"type": "TimmBackbone", "model": backbone.name, "args": backbone.kwargs, **kwargs}


# --- maps ----------------------------------------------------------------------------------------------------------


def test_some_blocks_or_stages():
    module = built(SWIN, out_indices=(1, -2))
    assert module.out_indices == (1, 2) and module.out_channels == (96, 192) and module.strides == (8, 16)
    assert [m.shape[1] for m in module(images())] == [96, 192]
    assert len(module.model.layers) == 3, "the stage that no map needs is dropped"
    sum(m.square().sum() for m in module(images())).backward()
    assert all(p.grad is not None for p in module.parameters())
    space = space_for(module.model)
    assert map_dimensions(module, space) == ("embed.1", "embed.2")
    assert slice_backbone(module, random_plan(space, 0)).out_channels == tuple(
        random_plan(space, 0).sizes[name] for name in ("embed.1", "embed.2")
    )
    plain = built(VIT_TINY, out_indices=(0, 1))
    assert [tuple(m.shape) for m in plain(images())] == [(2, 192, 4, 4)] * 2
    assert map_dimensions(plain, space_for(plain.model)) == ("embed", "embed")


@pytest.mark.parametrize("out_indices", [(), (0, 0), (2, 1), (4,), (-5, 0)])
def test_indices_that_no_map_has(out_indices, refused):
    with refused(f"out_indices={list(out_indices)}", "0 to 3", "4 stages"):
        TimmBackbone(SWIN.name, args=SWIN.kwargs, out_indices=out_indices)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", (*FOUR, DISTILLED, BEIT_3), ids=str)
@pytest.mark.parametrize("is_sliced", [False, True])
def test_a_run_folder(backbone, is_sliced, tmp_path):
    model, space = dense(backbone)
    plan = random_plan(space, 1, empty=sublayers(space, "together"))
    saved = sidt.slice_model(model, plan) if is_sliced else model
    sidt.save(saved, tmp_path, args=backbone.kwargs | {"num_classes": 10})
    module = TimmBackbone(str(tmp_path), args={"drop_path_rate": 0.0}).eval()
    check_last_map(module, saved, backbone.images())
    # A plan for the detector starts from the sliced model.
    again = slice_backbone(module, random_plan(space_for(module.model, backbone.input_size), 2))
    assert again.model.sidt_plan.space.sizes == space_for(module.model, backbone.input_size).sizes
    assert again(images(97, 130))[-1].shape[1] == again.out_channels[-1]


def test_weights_of_ones_own_with_their_classifier(tmp_path, refused):
    model, _ = dense(SWIN)
    torch.save({"model": model.state_dict()}, tmp_path / "swin.pth")
    args = SWIN.kwargs | {"num_classes": 10}
    module = TimmBackbone(SWIN.name, args=args, checkpoint=str(tmp_path / "swin.pth")).eval()
    check_last_map(module, model, SWIN.images())
    with refused("head.fc.weight", "[10, 384]", "[1000, 384]"):
        TimmBackbone(SWIN.name, args=SWIN.kwargs, checkpoint=str(tmp_path / "swin.pth"))


@pytest.mark.parametrize("backbone", FOUR, ids=str)
def test_published_weights(backbone, tmp_path):
    """timm's own loading, from a file in place of the net."""
    model, _ = dense(backbone)
    torch.save(model.state_dict(), tmp_path / "published.pth")
    published = {"pretrained_cfg_overlay": {"file": str(tmp_path / "published.pth"), "num_classes": 10}}
    args = backbone.kwargs | published | {"num_classes": 10}
    check_last_map(TimmBackbone(backbone.name, args=args, pretrained=True).eval(), model, backbone.images())


@pytest.mark.parametrize("backbone", FOUR, ids=str)
def test_mmengine_does_not_draw_the_weights_again(backbone):
    channels = TimmBackbone(backbone.name, args=backbone.kwargs).out_channels
    neck = {"type": "FPN", "in_channels": list(channels[-3:]), "out_channels": 16, "num_outs": 3}
    model = detector(config(backbone, out_indices=None if len(channels) == 1 else (1, 2, 3)), neck)
    shake(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.init_weights()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"neck", "bbox_head"}


def test_nor_those_of_a_slice():
    """MMDetection's own Swin draws new weights whenever it is asked to."""
    module, space = dense(MMDET_SWIN)
    neck = {"type": "FPN", "in_channels": [24, 48, 96, 192], "out_channels": 16, "num_outs": 4}
    model = detector({"type": MMDET_SWIN.name, **MMDET_SWIN.kwargs}, neck)
    model.backbone = slice_backbone(module, random_plan(space, 0))
    before = {key: tensor.clone() for key, tensor in model.backbone.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.backbone.state_dict().items())


# --- names and folders that do not fit -----------------------------------------------------------------------------


def test_models_that_cannot_be_used(tmp_path, monkeypatch, refused):
    with refused("vit_enormous", "vit_"):
        TimmBackbone("vit_enormous")
    with refused("no folder", tmp_path / "run"):
        TimmBackbone(str(tmp_path / "run"))
    with refused(tmp_path, "config.json"):
        TimmBackbone(str(tmp_path))
    with refused("wings"):
        TimmBackbone("vit_tiny_patch16_224", args={"wings": 2})
    with refused("Beit", "any size", "224"):
        TimmBackbone("beit_base_patch16_224", args={"depth": 1})
    with refused("VisionTransformer", "640, 3, 4", "384 channels"):  # a stem that rounds otherwise
        TimmBackbone("vit_small_r26_s32_224", args={"depth": 1})
    monkeypatch.delattr(ResNet, "forward_intermediates")
    with refused("ResNet", "resnet18", "forward_intermediates"):
        TimmBackbone("resnet18")
    with refused("pretrained=True", "a.pth", "not both"):
        TimmBackbone("vit_tiny_patch16_224", pretrained=True, checkpoint="a.pth")


def test_a_folder_that_does_not_fit(tmp_path, refused):
    model, _ = dense(VIT_TINY)
    sidt.save(model, tmp_path, args=VIT_TINY.kwargs | {"num_classes": 10})
    with refused(tmp_path, "brings its own weights"):
        TimmBackbone(str(tmp_path), pretrained=True)
    with refused("pos_embed", "[1, 17, 192]", "[1, 5, 192]"):
        TimmBackbone(str(tmp_path), args={"img_size": 32})
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"model": "resnet18"}))
    with refused():
        TimmBackbone(str(tmp_path))


# --- in a config ---------------------------------------------------------------------------------------------------


def test_a_plain_vit_with_the_pyramid_trains_and_predicts():
    model = detector(config(VIT_TINY), vit_neck())
    model.init_weights()
    loss(model, 64, 96).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    found = model.eval().predict(images(64, 96), samples(64, 96))
    assert len(found) == 2 and all(len(f.pred_instances) <= 10 for f in found)


@pytest.mark.parametrize("backbone", (SWIN, SWIN_V2, PVT), ids=str)
def test_a_model_of_stages_with_fpn_trains_and_predicts(backbone):
    channels = list(TimmBackbone(backbone.name, args=backbone.kwargs).out_channels)
    neck = {"type": "FPN", "in_channels": channels, "out_channels": 16, "num_outs": 4}
    model = detector(config(backbone), neck, strides=(4, 8, 16, 32))
    model.init_weights()
    loss(model, 96, 64).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert len(model.eval().predict(images(96, 64), samples(96, 64))) == 2


@pytest.mark.parametrize("backbone", FOUR, ids=str)
def test_a_sliced_backbone_from_a_config(backbone, tmp_path):
    module = built(backbone)
    plan = random_plan(space_for(module.model, backbone.input_size), 4)
    plan.save(tmp_path / "plan.json")
    sliced = slice_backbone(module, plan)
    full = config(backbone, pretrained=True, checkpoint="nowhere.pth")  # neither is read
    rebuilt = MODELS.build(ConfigDict(type="SlicedBackbone", dense=full, plan=str(tmp_path / "plan.json")))
    assert type(rebuilt) is TimmBackbone and rebuilt.out_channels == sliced.out_channels
    rebuilt.load_state_dict(sliced.state_dict())
    for a, b in zip(rebuilt.eval()(images(97, 130)), sliced(images(97, 130)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backbone", MMDET_BACKBONES, ids=str)
def test_mmdetections_own_backbones(backbone, tmp_path):
    module, space = dense(backbone)
    assert searchable(module) == ("", module)
    assert map_dimensions(module, space) == ("embed.0", "embed.1", "embed.2", "embed.3")
    plan = random_plan(space, 0)
    plan.save(tmp_path / "plan.json")
    init = {"type": "Pretrained", "checkpoint": "https://example.org/nowhere.pth"}
    own = {"type": backbone.name, "init_cfg": init, **backbone.kwargs}
    rebuilt = MODELS.build(ConfigDict(type="SlicedBackbone", dense=own, plan=str(tmp_path / "plan.json")))
    assert type(rebuilt) is type(module)
    sliced = slice_backbone(module, plan)
    rebuilt.load_state_dict(sliced.state_dict())
    rebuilt.eval()  # nothing comes back from MMDetection's Swin
    maps = sliced(backbone.images())
    assert [m.shape[1] for m in maps] == [plan.sizes[f"embed.{i}"] for i in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(rebuilt(backbone.images()), maps, strict=True))
    assert sliced.is_init and not rebuilt.is_init, "the slice keeps its weights, the config's has none to keep"


@pytest.mark.parametrize("backbone", MMDET_BACKBONES, ids=str)
def test_mmdetections_own_backbones_start_without_sublayers(backbone, tmp_path):
    """MMDetection draws the first weights of the dense backbone: of a convolution without channels it cannot."""
    space = dense(backbone)[1]
    random_plan(space, 0, empty=sublayers(space, "together")).save(tmp_path / "plan.json")
    own = {"type": backbone.name, **backbone.kwargs}
    model = detector({"type": "SlicedBackbone", "dense": own, "plan": str(tmp_path / "plan.json")}, None)
    model.init_weights()
    drawn = [m.weight for m in model.backbone.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(weight.std() > 0 for weight in drawn if weight.numel() > 1)
    assert any(not weight.numel() for weight in drawn)


@pytest.mark.parametrize("empty", [(), ("heads.0", "hidden.1"), ("heads.1", "hidden.1")], ids=str)
def test_a_slice_trains_in_a_detector(empty, tmp_path):
    plan = random_plan(space_for(built(VIT_TINY).model), 0, empty=empty)
    plan.save(tmp_path / "plan.json")
    backbone = {"type": "SlicedBackbone", "dense": config(VIT_TINY), "plan": str(tmp_path / "plan.json")}
    model = detector(backbone, vit_neck(plan.sizes["embed"]))
    model.init_weights()
    loss(model).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and p.numel()] == []


def test_plans_that_do_not_fit(tmp_path, refused):
    with refused("plan.json"):
        sliced_backbone(config(VIT_TINY), str(tmp_path / "plan.json"))
    random_plan(dense(PVT)[1], 0).save(tmp_path / "plan.json")
    with refused("another model", "PyramidVisionTransformerV2"):
        sliced_backbone(config(VIT_TINY), str(tmp_path / "plan.json"))
    with refused("another model"):
        slice_backbone(built(VIT_TINY), random_plan(dense(PVT)[1], 0))
