"""A detector as a space: masks, slices, the neck that follows the width, costs of its parts, its own loss."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import random_plan, shake, sublayers
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import sidt.detection.models  # registers the backbones and the neck
from sidt import importance as criteria
from sidt.allocation.greedy import allocate, uniform
from sidt.cost.budget import Budget
from sidt.cost.complexity import PlanCosts, report
from sidt.detection.detectors.backbones import slice_backbone
from sidt.detection.detectors.checkpoints import load_detector, save_detector
from sidt.detection.detectors.space import BACKBONE, detector_space, not_counted, parts, whole
from sidt.detection.runs.complexity import complexity_text
from sidt.errors import InputError
from sidt.space.families import INNER_KINDS, KINDS
from sidt.space.plan import DimensionPlan
from sidt.surgery.slicing import mask_model, slice_model

SIZE = (3, 64, 96)
SWIN = dict(
    type="SwinTransformer", embed_dims=16, depths=(1, 2, 1), num_heads=(2, 2, 4), window_size=4, strides=(4, 2, 2)
)
VIT = dict(type="TimmBackbone", model="vit_tiny_patch16_224")
VIT["args"] = dict(depth=2, img_size=64, patch_size=8, embed_dim=48, num_heads=4)
TIMM_SWIN = dict(type="TimmBackbone", model="swin_tiny_patch4_window7_224")
TIMM_SWIN["args"] = dict(img_size=64, embed_dim=16, depths=(1, 1, 2), num_heads=(2, 2, 4), window_size=4)
PVT = dict(type="PyramidVisionTransformerV2", embed_dims=8, num_layers=[1, 1, 1, 1], out_indices=(1, 2, 3))
FPN = dict(type="FPN", out_channels=16, num_outs=4)
HEAD = dict(
    type="RetinaHead",
    num_classes=5,
    in_channels=16,
    feat_channels=16,
    stacked_convs=1,
    anchor_generator=dict(type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0]),
    bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
)
PREPROCESSOR = dict(type="DetDataPreprocessor")
TRAIN = dict(
    assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
    sampler=dict(type="PseudoSampler"),
    allowed_border=-1,
    pos_weight=-1,
    debug=False,
)
TEST = dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=10)


def retina(backbone, neck, strides):
    head = {**HEAD, "anchor_generator": {**HEAD["anchor_generator"], "strides": strides}}
    common = dict(data_preprocessor=PREPROCESSOR, train_cfg=TRAIN, test_cfg=TEST)
    return dict(type="RetinaNet", backbone=backbone, neck=neck, bbox_head=head, **common)


DETECTORS = {
    "swin": retina(
        {**SWIN, "out_indices": (0, 1, 2)},
        {**FPN, "in_channels": [16, 32, 64], "start_level": 1, "add_extra_convs": "on_input"},
        [8, 16, 32, 64],
    ),
    "vit": retina(
        VIT,
        dict(type="SimpleFeaturePyramid", in_channels=48, hidden_channels=12, out_channels=16, scales=(2, 1, 0.5)),
        [4, 8, 16],
    ),
    "timm swin": retina(TIMM_SWIN, {**FPN, "in_channels": [16, 32, 64]}, [4, 8, 16, 32]),
    "pvt": retina(PVT, {**FPN, "in_channels": [16, 40, 64]}, [8, 16, 32, 64]),
}


@pytest.fixture(params=DETECTORS)
def name(request):
    return request.param


@cache
def made(name):
    """A detector with no parameter at its start, its config and its space."""
    init_default_scope("mmdet")
    torch.manual_seed(0)
    config = Config(dict(model=DETECTORS[name]))
    detector = shake(MODELS.build(config.model)).eval()
    return detector, config, detector_space(detector, config.model, SIZE)


def images(batch=2):
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(detector):
    """All that the heads say, in one list."""
    return [t for kind in detector.bbox_head(detector.extract_feat(images())) for t in kind]


def counted(detector):
    """Parameters and PyTorch's own count of multiply-adds of a real forward."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        detector.bbox_head(detector.extract_feat(images(1)))
    return [sum(p.numel() for p in detector.parameters()), counter.get_total_flops() // 2]


def predicted(space, plan):
    costs = PlanCosts(space)
    return costs.of(np.array([plan.sizes[n] for n in costs.names])).tolist()


@pytest.mark.parametrize("seed", range(2))
def test_masked_is_sliced(name, seed):
    detector, _, space = made(name)
    plan = random_plan(space, seed, INNER_KINDS)
    masked, sliced = mask_model(detector, plan), slice_model(detector, plan)
    for expected, seen in zip(outputs(masked), outputs(sliced), strict=True):
        assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    assert counted(sliced)[0] < counted(detector)[0]


@pytest.mark.parametrize("kinds", [("width",), KINDS], ids=["width", "all"])
def test_the_neck_follows_the_width(name, kinds):
    """Sliced backbone, and a dense neck that reads its maps with zeros where channels went: the same detector."""
    detector, _, space = made(name)
    plan = random_plan(space, 0, kinds)
    sliced = slice_model(detector, plan)
    inner = DimensionPlan(
        sidt.space_for(*_searched(detector)), {n: plan.keep[n] for n in plan.keep}
    )  # the same plan, of the backbone alone
    backbone = slice_backbone(detector.backbone, inner)
    maps = []
    with torch.no_grad():
        for channels, seen in zip(_map_names(detector, space), backbone(images()), strict=True):
            padded = seen.new_zeros(len(seen), space.sizes[channels], *seen.shape[2:])
            padded[:, plan.keep[channels]] = seen
            maps.append(padded)
        expected = [t for kind in detector.bbox_head(detector.neck(tuple(maps))) for t in kind]
    for wanted, seen in zip(expected, outputs(sliced), strict=True):
        assert_close(seen, wanted, rtol=1e-5, atol=1e-5)
    neck = [sum(p.numel() for p in d.neck.parameters()) for d in (detector, sliced)]
    assert neck[1] < neck[0]


def _searched(detector):
    return sidt.detection.detectors.backbones.searchable(detector.backbone)[1], SIZE


def _map_names(detector, space):
    return sidt.detection.detectors.backbones.map_dimensions(detector.backbone, space)


@pytest.mark.parametrize("seed", range(2))
def test_predicted_is_counted(name, seed):
    detector, _, space = made(name)
    for plan in (DimensionPlan(space, {}), random_plan(space, seed)):
        sliced = slice_model(detector, plan)
        assert predicted(whole(space), plan) == counted(sliced)
        rows = parts(space, plan.sizes)
        assert list(rows) == ["backbone", "neck", "bbox_head"]
        assert [sum(r.params for r in rows.values()), sum(r.macs for r in rows.values())] == counted(sliced)
        assert predicted(space, plan) == [rows["backbone"].params, rows["backbone"].macs]
        for part, row in rows.items():
            assert row.params == sum(p.numel() for p in getattr(sliced, part).parameters())


@pytest.mark.parametrize("empty", ["", "apart", "together"])
def test_saved_and_loaded_is_the_same(name, empty, tmp_path):
    detector, config, space = made(name)
    sliced = slice_model(detector, random_plan(space, 0, empty=sublayers(space, empty) if empty else ()))
    save_detector(sliced, config, tmp_path / "saved", tuple("abcde"))
    loaded, own = load_detector(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(outputs(sliced), outputs(loaded), strict=True))
    again = slice_model(loaded, random_plan(detector_space(loaded, own.model, SIZE), 1))
    save_detector(again, own, tmp_path / "again", tuple("abcde"))
    twice, _ = load_detector(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(outputs(again), outputs(twice), strict=True))
    assert counted(twice)[0] < counted(loaded)[0] < counted(detector)[0]


@pytest.mark.parametrize("budget", [Budget(params=0.7), Budget(macs=0.8), Budget(params=0.8, macs=0.9)], ids=str)
def test_the_budget_may_be_of_the_detector(budget):
    detector, _, space = made("swin")
    scores = criteria.magnitude(detector, space=whole(space))
    plan = allocate(scores, budget, kinds=KINDS)
    seen, dense = counted(slice_model(detector, plan)), counted(detector)
    for used, limit in zip(seen, budget.bounds(*dense), strict=True):
        assert limit is None or used <= limit
    assert any(limit and used >= 0.98 * limit for used, limit in zip(seen, budget.bounds(*dense), strict=True))


def test_importance_is_of_the_given_loss():
    """Taylor scores of a detector are those of its backbone alone, where the loss is of its maps alone."""
    detector, _, space = made("swin")
    batches = [images(), images() + 1]

    def of_maps(model, batch):
        return sum(m.square().mean() for m in getattr(model, "backbone", model)(batch))

    of_detector = criteria.taylor(detector, batches, of_maps, space=space)
    of_backbone = criteria.taylor(detector.backbone, batches, of_maps, space=sidt.space_for(*_searched(detector)))
    for dimension, scores in of_backbone.scores.items():
        np.testing.assert_allclose(of_detector.scores[dimension], scores, rtol=1e-5, atol=1e-12)


def test_a_neck_that_does_not_say_its_channels_keeps_the_width_whole():
    detector, config, _ = made("swin")
    silent = ConfigDict({**config.model.to_dict(), "neck": None})
    space = detector_space(detector, silent, SIZE)
    assert all(d.fixed for d in space.dimensions.values() if d.kind == "width")
    with pytest.raises(InputError):
        random = random_plan(made("swin")[2], 0, ("width",))
        DimensionPlan(space, random.keep)


def test_a_neck_of_other_channels_is_refused(refused):
    detector, config, _ = made("swin")
    wrong = Config(config.to_dict())
    wrong.model.neck.in_channels = [16, 32, 63]
    with refused("FPN", "[16, 32, 63]", "[16, 32, 64]"):
        detector_space(detector, wrong.model, SIZE)


def test_uniform_plans_shrink_alike():
    _, _, space = made("swin")
    plan = uniform(space, Budget(params=0.7))
    params, _ = predicted(space, plan)
    dense = PlanCosts(space).dense[0]
    assert 0.65 * dense < params <= 0.7 * dense
    left = {d.kind: [] for d in space.dimensions.values()}
    for dimension in space.dimensions.values():
        left[dimension.kind].append(plan.sizes[dimension.name] / dimension.size)
    assert set(left["heads"]) == set(left["width"]) == {1.0}
    assert max(left["mlp"]) - min(left["mlp"]) < 0.05 and max(left["mlp"]) < 1


def test_the_second_stage_is_counted_by_hand():
    init_default_scope("mmdet")
    config = Config.fromfile(str(Path(__file__).parents[3] / "configs" / "detection" / "mask_rcnn_swin_t.py"))
    config.model.backbone.update(embed_dims=24, depths=(1, 1, 1, 1), init_cfg=None)
    config.model.neck.in_channels = [24, 48, 96, 192]
    config.model.roi_head.bbox_head.fc_out_channels = 32
    detector = MODELS.build(config.model)
    space = detector_space(detector, config.model, SIZE)
    rows = parts(space)
    assert list(rows) == ["backbone", "neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head"]
    assert rows["roi_head.bbox_head"].macs == 1000 * (256 * 49 * 32 + 32 * 32 + 32 * 81 + 32 * 320)
    mask = 4 * 256 * 256 * 9 * 14 * 14 + 256 * 256 * 4 * 14 * 14 + 256 * 80 * 28 * 28
    assert rows["roi_head.mask_head"].macs == 100 * mask
    assert "1000 boxes" in not_counted(detector, space)
    detector.roi_head.mask_head.forward = None  # a head that needs more than its input
    assert not_counted(detector, space).startswith("roi_head.mask_head, ")
    assert report(space).params == rows["backbone"].params
    assert all(place.startswith(BACKBONE) or not place.startswith("backbone") for place in space.places)


def test_the_table_of_mask_rcnn_is_the_published_one():
    path = Path(__file__).parents[3] / "configs" / "detection" / "mask_rcnn_swin_t.py"
    text = complexity_text(str(path), None, None, "csv").splitlines()
    rows = {line.split(",")[0]: [int(c) for c in line.split(",")[1:]] for line in text[1:]}
    assert rows["total"][0] == 47_794_602 and round(rows["total"][3] / 1e9) == 267  # 48 M and 267 G
    assert rows["backbone"][0] == 27_520_698  # Swin-T with its four output norms
    for share, column in ((0.8, 1), (0.6, 2)):
        assert 0.99 * share * rows["backbone"][0] <= rows["backbone"][column] <= share * rows["backbone"][0]
        assert rows["neck"][column] == rows["neck"][0]
