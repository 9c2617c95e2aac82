"""Channels of necks and heads: which they are, and that what is sliced, repaired, saved and timed is right."""

from functools import cache
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from backbones import random_plan, shake
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.testing import assert_close

import sidt.detection.models  # noqa: F401 - registers the backbones
from sidt import importance as criteria
from sidt.allocation.greedy import allocate
from sidt.allocation.timing import measure_layers
from sidt.cost.budget import Budget
from sidt.cost.complexity import PlanCosts
from sidt.detection.detectors.channels import channels_outside
from sidt.detection.detectors.checkpoints import CONFIG, load_detector, save_detector
from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.detectors.space import _run_heads, detector_space, map_channels, parts, predict, whole
from sidt.errors import InputError
from sidt.files import read_json, write_json
from sidt.space.plan import DimensionPlan, load_plan
from sidt.space.space import DimensionSpace, Place, space_for
from sidt.space.trace import Trace
from sidt.surgery.compensation import compensate
from sidt.surgery.moments import measure_moments
from sidt.surgery.slicing import mask_model, slice_model

CONFIGS = Path(__file__).parents[3] / "configs" / "detection"
SIZE = (3, 64, 96)
SWIN = dict(
    type="SwinTransformer", embed_dims=16, depths=(1, 1, 1), num_heads=(2, 2, 4), window_size=4, strides=(4, 2, 2)
)
SWIN["out_indices"] = (0, 1, 2)
FPN = dict(type="FPN", in_channels=[16, 32, 64], out_channels=16, num_outs=3)
CODER = dict(type="DeltaXYWHBBoxCoder")
ANCHORS = dict(type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[4, 8, 16])
TOWERS = dict(num_classes=5, in_channels=16, feat_channels=16, stacked_convs=2)
RETINA = dict(type="RetinaHead", **TOWERS, anchor_generator=ANCHORS, bbox_coder=CODER)
ATSS = dict(
    RETINA,
    type="ATSSHead",
    norm_cfg=dict(type="GN", num_groups=4),
    loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True),
)
FCOS = dict(type="FCOSHead", **TOWERS, strides=[4, 8, 16], norm_cfg=dict(type="BN"), conv_bias=True)
TEST = dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=10)
ATSS_TRAIN = dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False)
BBOX, CLS, REG = "bbox_head.", "bbox_head.cls_convs.{}.conv", "bbox_head.reg_convs.{}.conv"
FPN_CHANNELS = {"neck.lateral_convs.0.conv": 16, "neck.fpn_convs.0.conv": 16}
TOWER_CHANNELS = {name.format(i): 16 for name in (CLS, REG) for i in range(2)}


def single(kind, neck, head, **more):
    return dict(
        type=kind,
        data_preprocessor=dict(type="DetDataPreprocessor"),
        backbone=SWIN,
        neck=neck,
        bbox_head=head,
        test_cfg=TEST,
        **more,
    )


def two_stages():
    """MMDetection's Mask R-CNN, smaller."""
    model = read_config(CONFIGS / "mask_rcnn_swin_t.py").model.to_dict()
    model["backbone"] = SWIN
    model["neck"] = dict(FPN, num_outs=4)
    model["rpn_head"] |= dict(in_channels=16, feat_channels=16)
    model["rpn_head"]["anchor_generator"]["strides"] = [4, 8, 16, 32]
    head, masks = model["roi_head"]["bbox_head"], model["roi_head"]["mask_head"]
    head |= dict(in_channels=16, fc_out_channels=24, num_classes=5)
    masks |= dict(in_channels=16, conv_out_channels=16, num_convs=3, num_classes=5)
    for name, strides in (("bbox_roi_extractor", [4, 8, 16]), ("mask_roi_extractor", [4, 8])):
        model["roi_head"][name] |= dict(out_channels=16, featmap_strides=strides)
    return model


MODELS_OF = {
    "RetinaNet": (
        single(
            "RetinaNet",
            dict(FPN, num_outs=4, start_level=1, add_extra_convs="on_output"),
            dict(RETINA, anchor_generator=dict(ANCHORS, strides=[8, 16, 32, 64])),
        ),
        {**FPN_CHANNELS, **TOWER_CHANNELS},
    ),
    "ATSS": (
        single("ATSS", FPN, ATSS, train_cfg=ATSS_TRAIN),
        {**FPN_CHANNELS, **dict.fromkeys(TOWER_CHANNELS, 4)},  # groups
    ),
    "FCOS": (single("FCOS", dict(FPN, norm_cfg=dict(type="BN")), FCOS), {**FPN_CHANNELS, **TOWER_CHANNELS}),
    "PAFPN": (
        single("RetinaNet", dict(FPN, type="PAFPN"), RETINA),
        {"neck.lateral_convs.0.conv": 16, **{f"neck.fpn_convs.{i}.conv": 16 for i in range(3)}, **TOWER_CHANNELS},
    ),
    "Mask R-CNN": (
        two_stages(),
        {
            **FPN_CHANNELS,
            "rpn_head.rpn_conv": 16,
            "roi_head.bbox_head.shared_fcs.0": 24,
            "roi_head.bbox_head.shared_fcs.1": 24,
            **{f"roi_head.mask_head.convs.{i}.conv": 16 for i in range(2)},  # a transposed convolution reads the last
        },
    ),
}


@pytest.fixture(params=MODELS_OF)
def name(request):
    return request.param


@cache
def made(name):
    """A detector, its config, and its space with the channels of neck and heads."""
    init_default_scope("mmdet")
    torch.manual_seed(0)
    config = Config(dict(model=MODELS_OF[name][0]))
    detector = shake(MODELS.build(config.model)).eval()
    return detector, config, detector_space(detector, config.model, SIZE, outside=True)


def channels(space):
    return {n: d.size for n, d in space.dimensions.items() if d.kind == "channels"}


@torch.no_grad()
def outputs(detector, regions=lambda r, maps: r.fill_(0.5)):
    """All that the heads give for an image; regions are of one value, unless they are told otherwise."""
    image = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(1))
    maps = detector.extract_feat(image)
    return list(tensors(_run_heads(detector, image, maps, lambda r, m, _: regions(r, m))[1]))


def tensors(values):
    for value in values:
        yield from [value] if isinstance(value, torch.Tensor) else tensors(value)


def test_they_are_seen(name):
    detector, config, space = made(name)
    assert channels(space) == MODELS_OF[name][1]
    assert not channels(detector_space(detector, config.model, SIZE))
    assert space.title(()) == "outside" and space.in_block(())[0].kind in ("channels", "width")


@pytest.mark.parametrize("seed", range(3))
def test_masked_is_sliced(name, seed):
    detector, _, space = made(name)
    plan = random_plan(space, seed, ("heads", "qk", "v", "mlp", "channels"))
    sliced = slice_model(detector, plan)
    for seen, wanted in zip(outputs(sliced), outputs(mask_model(detector, plan)), strict=True):
        assert_close(seen, wanted, rtol=1e-4, atol=1e-5)
    for module in sliced.modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.num_channels, module.num_channels // module.num_groups) == (len(module.weight), 4)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean) == len(module.bias)


@pytest.mark.parametrize("name", ["RetinaNet", "ATSS", "FCOS", "PAFPN", "Mask R-CNN"])
def test_predicted_is_counted(name):
    detector, config, space = made(name)
    plan = random_plan(space, 0)
    sliced = slice_model(detector, plan)
    costs = PlanCosts(whole(space))
    predicted = costs.of(np.array([plan.sizes[n] for n in costs.names])).tolist()
    seen = parts(detector_space(sliced, followed(config, plan), SIZE)).values()
    assert predicted == [sum(row.params for row in seen), sum(row.macs for row in seen)]
    assert predicted[0] == sum(p.numel() for p in sliced.parameters())


def followed(config, plan):
    """The config's model, whose neck reads fewer channels."""
    model = Config(config.to_dict()).model
    model.neck.in_channels = [plan.sizes[f"embed.{i}"] for i in range(3)]
    model.neck.out_channels = 16
    return model


def test_saved_and_loaded_is_the_same(name, tmp_path):
    detector, config, space = made(name)
    first = slice_model(detector, random_plan(space, 0))
    save_detector(first, config, tmp_path / "first", tuple("abcde"))
    loaded, own = load_detector(tmp_path / "first")
    assert same(first, loaded) and loaded.sidt_plan.sizes == first.sidt_plan.sizes
    assert own.model.neck.type == "SlicedPart" and own.model.neck.dense.type == config.model.neck.type
    for outside in (False, True):  # and again, the backbone alone or all of it
        inner = detector_space(loaded, own.model, SIZE, outside=outside)
        again = slice_model(loaded, random_plan(inner, 1))
        save_detector(again, own, tmp_path / "again", tuple("abcde"))
        twice, last = load_detector(tmp_path / "again")
        assert same(again, twice) and twice.sidt_plan.sizes == again.sidt_plan.sizes
        save_detector(twice, last, tmp_path / "copy", tuple("abcde"))
        assert (tmp_path / "copy" / CONFIG).read_text() == (tmp_path / "again" / CONFIG).read_text()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


def test_the_backbone_takes_its_part_of_a_plan(tmp_path):
    detector, _, space = made("ATSS")
    plan = random_plan(space, 0)
    plan.save(tmp_path / "plan.json")
    inner = space_for(detector.backbone, SIZE)
    part = load_plan(tmp_path / "plan.json", inner, part=True)
    with pytest.raises(InputError, match="made for another model"):
        load_plan(tmp_path / "plan.json", inner)
    assert set(part.sizes) == set(plan.sizes) - set(channels(space))
    data = read_json(tmp_path / "plan.json")
    data["channels"] = []
    write_json(tmp_path / "plan.json", data)
    with pytest.raises(InputError, match="made for another model"):
        load_plan(tmp_path / "plan.json", inner, part=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("channels", 3), ("channels", ["nowhere"]), ("channels", [["a"]]), ("keep", {}), ("dense", {})],
)
def test_a_damaged_plan_is_refused(key, value, tmp_path):
    detector, config, space = made("ATSS")
    save_detector(slice_model(detector, random_plan(space, 0)), config, tmp_path, tuple("abcde"))
    write_json(tmp_path / "plan.json", {**read_json(tmp_path / "plan.json"), key: value})
    with pytest.raises(InputError):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("'cls_convs.0.conv.weight'", "'cls_convs.7.conv.weight'", "not there"),
        ("gn.num_groups", "gn.num_grous", "has no"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(old, new, says, tmp_path):
    detector, config, space = made("ATSS")
    save_detector(slice_model(detector, random_plan(space, 0)), config, tmp_path, tuple("abcde"))
    text = (tmp_path / CONFIG).read_text()
    assert old.replace("'", '"') in text or old in text
    (tmp_path / CONFIG).write_text(text.replace(old, new))
    with pytest.raises(InputError, match=says):
        load_detector(tmp_path)


def test_a_size_of_a_part_must_fit():
    with pytest.raises(InputError, match="cannot be cut"):
        MODELS.build(
            dict(
                type="SlicedPart", dense=FPN, shapes={"fpn_convs.0.conv.weight": [17, None, None, None]}, attributes={}
            )
        )


class Reshaping(nn.Module):
    """A head that mixes the channels of its first layer."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.last = way, nn.Conv2d(16, 8, 1), nn.Conv2d(16 if way == "cat" else 8, 4, 1)

    def forward(self, maps):
        x = self.first(maps[0]).relu()
        if self.way == "cat":
            x = torch.cat([x, x], 1)
        elif self.way == "mean":
            x = x - x.mean(1, keepdim=True)
        elif self.way == "weight":
            return (nn.functional.conv2d(x, 2 * self.last.weight, self.last.bias),)
        elif self.way == "groups":  # a norm without a weight, whose number of groups is nobody's
            return (self.last(nn.functional.group_norm(x, 4)),)
        elif self.way == "itself":
            return (self.last(x + x.sigmoid()),)
        return (self.last(x),)


@pytest.mark.parametrize(("way", "left"), [("cat", 0), ("mean", 0), ("weight", 0), ("groups", 0), ("itself", 1)])
def test_what_is_mixed_stays_whole(way, left):
    """Channels of which something else is made; the neck's are still those that the first layer reads."""
    detector, config, _ = made("RetinaNet")
    detector = slice_model(detector, DimensionPlan(made("RetinaNet")[2], {}))
    del detector.sidt_plan
    detector.bbox_head = Reshaping(way)
    space = detector_space(detector, config.model, SIZE, outside=True)
    found = channels(space)
    assert sum(n.startswith("bbox_head") for n in found) == left
    assert "neck.fpn_convs.0.conv" in found


@pytest.mark.parametrize("change", ["fails", "extra", "tied"])
def test_what_is_not_seen_stays_whole(change):
    detector, config, space = made("RetinaNet")
    detector = slice_model(detector, DimensionPlan(space, {}))
    del detector.sidt_plan
    if change == "fails":
        detector.bbox_head.forward = lambda maps: 1 / 0
    elif change == "extra":  # it may read the maps in training
        detector.auxiliary = nn.Conv2d(16, 16, 1)
    else:
        detector.bbox_head.reg_convs[0].conv.weight = detector.bbox_head.cls_convs[0].conv.weight
    found = channels(detector_space(detector, config.model, SIZE, outside=True))
    assert (
        found.keys()
        == {
            "fails": {"neck.lateral_convs.0.conv"},
            "extra": set(channels(space)) - {"neck.fpn_convs.0.conv"},
            "tied": set(channels(space)) - {CLS.format(0), REG.format(0), "neck.fpn_convs.0.conv"},
        }[change]
    )


@pytest.mark.parametrize("name", ["RetinaNet", "ATSS", "PAFPN"])
def test_repair_of_channels(name):
    """The layers that read fewer channels are refitted: nothing changes if none went, and the error is smaller."""
    detector, _, space = made(name)
    images = [torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def forward(model, batch):
        return model.bbox_head(model.extract_feat(batch))

    moments = measure_moments(detector, images, forward=forward, space=space)
    untouched = compensate(detector, DimensionPlan(space, {}), moments)
    assert same(detector, untouched)
    for only in channels(space):
        kept = np.arange(space.sizes[only] - space.sizes[only] // 4)
        plan = DimensionPlan(space, {only: kept})

        def error(model):
            with torch.no_grad():
                pairs = [zip(tensors(forward(model, i)), tensors(forward(detector, i)), strict=True) for i in images]
            return sum((a - b).square().sum().item() for own in pairs for a, b in own)

        plain, repaired = error(slice_model(detector, plan)), error(compensate(detector, plan, moments))
        assert repaired < plain, only


def test_a_budget_of_the_detector_cuts_them():
    detector, _, space = made("ATSS")
    scores = criteria.magnitude(detector, space=whole(space))
    plan = allocate(scores, Budget(macs=0.3))
    assert any(plan.sizes[n] < size for n, size in channels(space).items())
    assert all(plan.sizes[n] == size for n, size in channels(space).items() if n not in plan.keep)
    frozen = allocate(scores, Budget(macs=0.9), freeze=["neck.*", "bbox_head.*"])
    assert all(frozen.sizes[n] == size for n, size in channels(space).items())


def test_their_layers_are_timed():
    """Every layer of neck and heads follows its channels, and the dense sizes take the measured time."""
    detector, _, space = made("ATSS")
    found = measure_layers(detector, whole(space), rounds=1, forward=predict, progress=False)
    timed = {name: dims for table in found.tables for name, dims in table.layers.items()}
    assert found.timed >= set(channels(space))
    assert timed["neck.fpn_convs.1.conv"] == ("neck.lateral_convs.0.conv", "neck.fpn_convs.0.conv")
    assert timed[CLS.format(1)] == (CLS.format(0), CLS.format(1))
    assert found.milliseconds(space.sizes) == pytest.approx(found.dense_ms, rel=1e-6)
    fewer = {**space.sizes, "neck.fpn_convs.0.conv": 8}
    assert found.milliseconds(fewer) <= found.dense_ms


def test_the_maps_of_a_sliced_neck():
    detector, _, space = made("RetinaNet")
    axes = map_channels(detector, SIZE)
    assert set(axes) == {(("neck.fpn_convs.0.conv",),)} and len(axes) == 4
    assert map_channels(slice_model(detector, random_plan(space, 0)), SIZE) == axes


OWN = {  # configs of MMDetection, and how many dimensions their necks and heads have
    "retinanet/retinanet_r50_fpn_1x_coco": 10,
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco": 10,
    "atss/atss_r50_fpn_1x_coco": 10,
    "gfl/gfl_r50_fpn_1x_coco": 10,
    "paa/paa_r50_fpn_1x_coco": 10,
    "vfnet/vfnet_r50_fpn_1x_coco": 7,
    "tood/tood_r50_fpn_1x_coco": 6,
    "foveabox/fovea_r50_fpn_4xb4-1x_coco": 10,
    "fsaf/fsaf_r50_fpn_1x_coco": 10,
    "yolof/yolof_r50-c5_8xb8-1x_coco": 16,
    "yolox/yolox_s_8xb8-300e_coco": 27,
    "rtmdet/rtmdet_tiny_8xb32-300e_coco": 13,
    "pafpn/faster-rcnn_r50_pafpn_1x_coco": 8,
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco": 5,
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco": 8,
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco": 9,
    "detr/detr_r50_8xb2-150e_coco": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_necks_and_heads_of_mmdetection(name):
    """The neck and the heads of its configs, behind a backbone whose space is not asked for."""
    path = Path(mmdet.__file__).parent / ".mim" / "configs" / f"{name}.py"
    config = read_config(path)
    torch.manual_seed(0)
    detector = shake(build_detector(config)).eval()
    size = (3, 128, 128)
    places = {n: Place(tuple(((s,),) for s in p.shape), n, False) for n, p in detector.named_parameters()}
    nothing = Trace({}, {"": 0}, size, (), {})
    bare = DimensionSpace("", "", {}, places, {}, {}, "sidt.surgery.attention", nothing, {})
    space = channels_outside(detector, size, _run_heads).within(bare)
    assert len(channels(space)) == OWN[name]
    if OWN[name]:
        plan = random_plan(space, 0, ("channels",))
        sliced, masked = slice_model(detector, plan), mask_model(detector, plan)
        for seen, wanted in zip(outputs(sliced), outputs(masked), strict=True):
            assert_close(seen, wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(wanted.abs().max())))
