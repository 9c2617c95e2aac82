"""Channels of necks and heads: which they are, and that what is sliced, repaired and timed is right."""

from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from backbones import random_plan, shake
from mmengine.config import Config
from small_heads import CLS, FPN_CHANNELS, MODELS_OF, REG, SIZE, TOWER_CHANNELS, channels, made, outputs, same, tensors
from torch import nn
from torch.testing import assert_close

from sidt import importance as criteria
from sidt.allocation.greedy import allocate
from sidt.allocation.timing import measure_layers
from sidt.cost.budget import Budget
from sidt.cost.complexity import PlanCosts
from sidt.detection.detectors.channels import channels_outside
from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.detectors.space import _run_heads, detector_space, map_channels, parts, predict, whole
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, Place
from sidt.space.trace import Trace
from sidt.surgery.compensation import compensate
from sidt.surgery.moments import measure_moments
from sidt.surgery.slicing import mask_model, slice_model


@pytest.fixture(params=MODELS_OF)
def name(request):
    return request.param


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


def test_groups_go_so_that_channels_stay_round():
    detector, _, space = made("ATSS")
    plan = allocate(criteria.random(detector, space=whole(space)), Budget(macs=0.45), round_to=8)
    left = {name: plan.sizes[name] for name in TOWER_CHANNELS}
    assert {space.dimensions[name].channels for name in left} == {4}
    assert set(left.values()) <= {2, 4} and 2 in left.values()  # groups of four channels
    assert all(plan.sizes[name] % 8 == 0 for name in FPN_CHANNELS)


def followed(config, plan):
    """The config's model, whose neck reads fewer channels."""
    model = Config(config.to_dict()).model
    model.neck.in_channels = [plan.sizes[f"embed.{i}"] for i in range(3)]
    model.neck.out_channels = 16
    return model


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
