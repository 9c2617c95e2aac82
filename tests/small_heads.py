"""Small detectors whose necks and heads are of every kind that is cut, and what these give."""

from functools import cache
from pathlib import Path

import torch
from backbones import shake
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

import sidt.detection.models  # noqa: F401 - registers the backbones
from sidt.detection.detectors.configs import read_config
from sidt.detection.detectors.space import _run_heads, detector_space

CONFIGS = Path(__file__).parents[1] / "configs" / "detection"
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


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))
