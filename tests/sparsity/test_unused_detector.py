"""Unused paths of a detector's backbone leave by the same functions; its heads say what they said."""

import pytest
import torch
from backbones import shake
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch.testing import assert_close

import sidt.detection.models  # noqa: F401 - registers the backbones and the neck
from sidt.detection.detectors.space import detector_space, run_backbone
from sidt.sparsity import remove_unused

SIZE = (3, 64, 96)
SWIN = dict(type="SwinTransformer", embed_dims=16, depths=(1, 1), num_heads=(2, 2), window_size=4, strides=(4, 2))
PVT = dict(type="PyramidVisionTransformerV2", embed_dims=8, num_layers=[1, 1, 1, 1], out_indices=(1, 2))
TIMM = dict(type="TimmBackbone", model="vit_tiny_patch16_224")
TIMM["args"] = dict(depth=2, img_size=64, patch_size=8, embed_dim=48, num_heads=4)
PYRAMID = dict(type="SimpleFeaturePyramid", in_channels=48, hidden_channels=12, out_channels=16, scales=(1, 0.5))
DETECTORS = {
    "swin": (SWIN | {"out_indices": (0, 1)}, dict(type="FPN", in_channels=[16, 32], out_channels=16, num_outs=2)),
    "pvt": (PVT, dict(type="FPN", in_channels=[16, 40], out_channels=16, num_outs=2)),
    "vit": (TIMM, PYRAMID),
}
HEAD = dict(
    type="RetinaHead",
    num_classes=5,
    in_channels=16,
    feat_channels=16,
    stacked_convs=1,
    anchor_generator=dict(
        type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[4, 8]
    ),
    bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_says_the_same(name):
    init_default_scope("mmdet")
    torch.manual_seed(0)
    backbone, neck = DETECTORS[name]
    config = Config(dict(model=dict(type="RetinaNet", backbone=backbone, neck=neck, bbox_head=HEAD)))
    detector = shake(MODELS.build(config.model)).eval()
    space = detector_space(detector, config.model, SIZE)
    tensors = dict(detector.named_parameters())
    block = "1" if name == "vit" else "1.0"
    heads, hidden = f"heads.{block}", f"hidden.{block}"
    writers = [n for n, p in space.places.items() if p.axes[0] == ((hidden,),)]
    (proj,) = (n for n, p in space.places.items() if p.axes[-1] == ((heads, f"v.{block}"),) and len(p.axes) > 1)
    with torch.no_grad():
        tensors[writers[0]][:3] = 0
        if name == "pvt":  # its depthwise convolution would see where the bias ends
            tensors[writers[1]][:3] = 0
        tensors[proj][:, : tensors[proj].shape[1] // space.sizes[heads]] = 0

    smaller = remove_unused(detector, space, forward=lambda model, batch: run_backbone(model, batch[0]))
    expected = {hidden: space.sizes[hidden] - 3, heads: space.sizes[heads] - 1}
    assert smaller.sidt_plan.sizes == space.sizes | expected
    images = torch.randn(1, *SIZE)
    with torch.no_grad():
        before, after = ([t for kind in m.bbox_head(m.extract_feat(images)) for t in kind] for m in (detector, smaller))
    for found, wanted in zip(after, before, strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))
