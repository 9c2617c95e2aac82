"""What the detection extra installs works together: mmcv, its operators, and MMDetection's models."""

import torch


def test_mmcv_has_operators():
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1]
    assert kept.tolist() == [0, 2]


def test_mmdetection_builds_a_model():
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    backbone = MODELS.build({"type": "SwinTransformer", "embed_dims": 24, "depths": (1, 1, 1, 1)})
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [24, 48, 96, 192]
