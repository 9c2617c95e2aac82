"""Segmentors of MMSegmentation as spaces: the heads that follow the width, their own loss, the way to disk and back."""

import numpy as np
import pytest
import torch
from backbones import random_plan, shake
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn
from torch.testing import assert_close

from sidt import importance as criteria
from sidt.allocation.greedy import allocate
from sidt.allocation.study import search
from sidt.cost.budget import Budget
from sidt.cost.complexity import PlanCosts
from sidt.detection.detectors.backbones import map_dimensions
from sidt.detection.detectors.checkpoints import load_detector, save_detector
from sidt.detection.detectors.configs import build_detector, maps_of, read_config, readers
from sidt.detection.detectors.space import detector_space, parts, whole
from sidt.detection.training.loss import detector_loss
from sidt.errors import InputError
from sidt.surgery.alignment import align
from sidt.surgery.compensation import compensate
from sidt.surgery.moments import measure_moments
from sidt.surgery.slicing import slice_model

SIZE = (3, 32, 48)
SWIN = dict(type="mmdet.SwinTransformer", embed_dims=16, depths=(1, 1, 1), num_heads=(2, 2, 4), window_size=4)
SWIN |= dict(strides=(4, 2, 2), out_indices=(0, 1, 2))
VIT = dict(type="TimmBackbone", model="vit_tiny_patch16_224")
VIT["args"] = dict(depth=2, img_size=32, patch_size=8, embed_dim=48, num_heads=4)
COMMON = dict(channels=8, num_classes=4, norm_cfg=dict(type="BN"))
ALL = dict(in_channels=[16, 32, 64], in_index=[0, 1, 2], **COMMON)
ONE = dict(type="FCNHead", num_convs=1, concat_input=False, **COMMON)


def segmentor_config(backbone, decode, auxiliary=None):
    size = dict(size=SIZE[1:], mean=[128.0] * 3, std=[64.0] * 3)
    model = dict(type="EncoderDecoder", data_preprocessor=dict(type="SegDataPreProcessor", **size))
    model |= dict(backbone=backbone, decode_head=decode, auxiliary_head=auxiliary, test_cfg=dict(mode="whole"))
    return Config(dict(default_scope="mmseg", model=model))


CONFIGS = {
    "all maps, and one beside": segmentor_config(
        SWIN, dict(type="SegformerHead", **ALL), dict(in_channels=32, in_index=1, **ONE)
    ),
    "several beside": segmentor_config(
        SWIN,
        dict(type="FPNHead", feature_strides=[4, 8, 16], **ALL),
        [dict(in_channels=64, in_index=2, **ONE), dict(in_channels=16, in_index=0, **ONE)],
    ),
    "a plain ViT": segmentor_config(VIT, dict(in_channels=48, **ONE)),
}
PVT = dict(type="mmdet.PyramidVisionTransformerV2", embed_dims=8, num_layers=[1, 1, 1, 1], out_indices=(1, 2, 3))
SLICED = CONFIGS | {
    "PVT v2": segmentor_config(PVT, dict(type="SegformerHead", **{**ALL, "in_channels": [16, 40, 64]})),
}
PARTLY = segmentor_config(SWIN, dict(type="UPerHead", pool_scales=(1, 2), **ALL))


@pytest.fixture(autouse=True)
def scope():
    """Other tests find MMDetection's names again."""
    yield
    init_default_scope("mmdet")


def test_who_reads_the_maps_without_mmsegmentation():
    model = CONFIGS["several beside"].model
    assert [path for _, path in readers(model)] == ["decode_head", "auxiliary_head.0", "auxiliary_head.1"]
    maps = ["a", "b", "c"]
    assert [maps_of(reader, maps) for reader, _ in readers(model)] == [maps, ["c"], ["a"]]
    assert maps_of(dict(in_channels=[1, 2], in_index=[2, 0]), maps) == ["c", "a"]
    assert maps_of(dict(in_channels=1), maps) == ["c"]
    with_neck = ConfigDict(model, neck=dict(type="FPN", in_channels=[16, 32, 64]))
    assert [path for _, path in readers(with_neck)] == ["neck"]
    assert readers(dict(backbone={})) == []


def made(config):
    """A segmentor with no parameter at its start, and its space."""
    pytest.importorskip("mmseg", reason="onedl-mmsegmentation is not installed")
    torch.manual_seed(0)
    segmentor = shake(build_detector(config)).eval()
    return segmentor, detector_space(segmentor, config.model, SIZE)


def images():
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))


def heads_of(segmentor):
    auxiliary = getattr(segmentor, "auxiliary_head", [])
    return [segmentor.decode_head, *(auxiliary if isinstance(auxiliary, nn.ModuleList | list) else [auxiliary])]


@torch.no_grad()
def outputs(segmentor, given=None):
    """What every head says of some images."""
    maps = segmentor.extract_feat(images() if given is None else given)
    return [head(maps) for head in heads_of(segmentor)]


def batches():
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(3):
        images = [torch.randint(0, 256, SIZE, generator=generator, dtype=torch.uint8) for _ in range(4)]
        samples = [SegDataSample(metainfo=dict(img_shape=SIZE[1:], ori_shape=SIZE[1:])) for _ in images]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 4, (1, *SIZE[1:]), generator=generator))
        found.append(dict(inputs=images, data_samples=samples))
    return found


@pytest.mark.parametrize("name", SLICED)
def test_a_slice_is_what_the_space_says_and_comes_back_from_disk(name, tmp_path):
    config = SLICED[name]
    segmentor, space = made(config)
    widths = [d for d in space.dimensions.values() if d.kind == "width"]
    assert widths and not any(d.fixed for d in widths)
    plan = random_plan(space, 0)
    assert all(plan.sizes[d.name] < d.size for d in widths)
    small = slice_model(segmentor, plan)
    costs = PlanCosts(whole(space))
    params = costs.of(np.array([plan.sizes[n] for n in costs.names])).tolist()[0]
    assert params == sum(p.numel() for p in small.parameters())
    assert {row.name for row in parts(space).values() if row.macs} >= {"backbone", "decode_head"}
    maps = []  # what the dense heads make of the small backbone's maps, with zeros where channels went
    with torch.no_grad():
        for width, seen in zip(map_dimensions(segmentor.backbone, space), small.backbone(images()), strict=True):
            maps.append(seen.new_zeros(len(seen), space.sizes[width], *seen.shape[2:]))
            maps[-1][:, plan.keep[width]] = seen
        assert_close(outputs(small), [head(maps) for head in heads_of(segmentor)], rtol=1e-5, atol=1e-5)
    save_detector(small, config, tmp_path / "small", ("a", "b", "c", "d"))
    again, own = load_detector(tmp_path / "small")
    assert_close(outputs(again), outputs(small))
    assert [r.in_channels for r, _ in readers(own.model)] != [r.in_channels for r, _ in readers(config.model)]
    from mmseg.apis import init_model

    files = (str(tmp_path / "small" / name) for name in ("config.py", "model.safetensors"))
    assert_close(outputs(init_model(*files, device="cpu")), outputs(small))


@pytest.mark.parametrize("name", CONFIGS)
def test_alignment_and_repair_stand_on_its_own_loss(name):
    segmentor, space = made(CONFIGS[name])
    own = batches()
    aligned, moments = align(segmentor, measure_moments(segmentor, own, forward=detector_loss, space=space))
    assert getattr(aligned, "sidt_rotated", ()), "no width was rotated"
    assert_close(outputs(aligned), outputs(segmentor), atol=2e-4, rtol=2e-4)
    scores = criteria.taylor(aligned, own, detector_loss, space=moments.space)
    plan = allocate(scores, Budget(params=0.5))
    small = compensate(aligned, plan, moments)
    left, dense = (sum(p.numel() for p in model.backbone.parameters()) for model in (small, segmentor))
    assert 0.47 < left / dense <= 0.5

    seen = torch.cat([segmentor.data_preprocessor(batch)["inputs"] for batch in own])

    def error(model):
        pairs = zip(outputs(model, seen), outputs(segmentor, seen), strict=True)
        return sum(float((a - b).square().mean()) for a, b in pairs)

    assert error(small) < 0.7 * error(slice_model(aligned, plan))


def test_a_search_maximises_mean_iou():
    segmentor, space = made(CONFIGS["all maps, and one beside"])
    from mmseg.evaluation import IoUMetric

    own, seen = batches(), []

    def mean_iou(candidate):
        metric = IoUMetric()
        metric.dataset_meta = dict(classes=("a", "b", "c", "d"))
        for batch in own:
            metric.process(batch, [s.to_dict() for s in candidate.test_step(dict(batch))])
        seen.append(metric.evaluate(12)["mIoU"])
        return seen[-1]

    scores = criteria.taylor(segmentor, own, detector_loss, space=space)
    found = search(segmentor, scores, Budget(params=0.6), mean_iou, trials=3, progress=False)
    assert len(seen) >= 3 and mean_iou(slice_model(segmentor, found.plan)) == pytest.approx(max(seen))


def test_a_map_that_is_read_in_a_way_that_is_not_known_stays_whole_alone():
    _, space = made(PARTLY)
    assert [d.name for d in space.dimensions.values() if d.fixed] == ["embed.2"]  # the head pools and joins it
    assert space.streams["embed.2"] == "it is not known how its map is read"


def test_the_later_heads_of_a_cascade_are_not_asked_what_they_do_with_the_maps():
    first, second = (
        dict(in_channels=64, in_index=2, **ONE),
        dict(type="OCRHead", in_channels=64, ocr_channels=8, **COMMON),
    )
    config = segmentor_config(SWIN, [first, second])
    config.model |= dict(type="CascadeEncoderDecoder", num_stages=2)
    _, space = made(config)
    assert space.streams["embed.2"] == "decode_head.1 reads more than maps"


def test_wrong_channels_are_named():
    config = segmentor_config(SWIN, dict(in_channels=64, in_index=2, **ONE))
    segmentor, _ = made(config)
    config.model.decode_head.in_index = 1
    said = r"the decode head FCNHead has in_channels=64, but .* have \[32\] channels; set decode_head.in_channels=32"
    with pytest.raises(InputError, match=said):
        detector_space(segmentor, config.model, SIZE)


@torch.no_grad()
def test_mmsegmentations_swin_has_the_weights_of_mmdetections(tmp_path):
    own = segmentor_config({**SWIN, "type": "SwinTransformer"}, dict(type="SegformerHead", **ALL))
    with pytest.raises(InputError, match=r"no search space for mmseg.*SwinTransformer"):
        made(own)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    theirs = shake(MODELS.build(own.model)).eval()
    (tmp_path / "config.py").write_text(own.dump(), encoding="utf-8")
    config = read_config(tmp_path / "config.py", {"model.backbone.type": "mmdet.SwinTransformer"})
    segmentor = build_detector(config).eval()
    segmentor.load_state_dict(theirs.state_dict())
    assert_close(outputs(segmentor), outputs(theirs), atol=0, rtol=0)
