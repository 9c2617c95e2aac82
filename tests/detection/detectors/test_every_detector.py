"""Every config of this repository, and MMDetection's detectors on a pruned Swin: they are sliced, train and predict."""

from pathlib import Path
from types import SimpleNamespace

import mmdet
import numpy as np
import pytest
import torch
from backbones import random_plan, shake
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch.testing import assert_close

import sidt.detection.models  # noqa: F401 - registers the backbones and the neck
from sidt.cost.complexity import PlanCosts
from sidt.detection.detectors.checkpoints import load_detector, save_detector
from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.detectors.space import BACKBONE, detector_space, whole
from sidt.space.families import INNER_KINDS, KINDS
from sidt.surgery.slicing import mask_model, slice_model

OWN = Path(__file__).parents[3] / "configs" / "detection"
MMDET = Path(mmdet.__file__).parent / ".mim" / "configs"
SMALL, SQUARE = (64, 96), (96, 96)  # height and width of the image
BOXES = [[8, 6, 40, 44], [48, 20, 80, 60]]

# --- how MMDetection's detectors are made small --------------------------------------------------------------------

SWIN = {"_delete_": True, "type": "SwinTransformer", "embed_dims": 24, "depths": (1, 1, 2, 1), "window_size": 4}
SWIN |= {"num_heads": (1, 2, 4, 8), "drop_path_rate": 0.0}
THREE = SWIN | {"out_indices": (1, 2, 3)}
ALL_MAPS = {"backbone": SWIN, "neck": {"in_channels": [24, 48, 96, 192], "out_channels": 16}}
LAST_MAPS = {"backbone": THREE, "neck": {"in_channels": [48, 96, 192], "out_channels": 16, "start_level": 0}}
GROUPS = {"type": "GN", "num_groups": 4}
HEAD = {"in_channels": 16, "feat_channels": 16}
SHOW_ALL = {"score_thr": 0.0, "max_per_img": 20}
CUT = {"bbox_roi_extractor": {"out_channels": 16}}
BOX_HEAD = {"in_channels": 16, "fc_out_channels": 32}
RCNN = ALL_MAPS | {"rpn_head": HEAD, "test_cfg": {"rcnn": SHOW_ALL}}
ATTENTION, FFN = {"embed_dims": 16}, {"embed_dims": 16, "feedforward_channels": 32}
LAYERS = {"num_layers": 1, "layer_cfg": {"self_attn_cfg": ATTENTION, "ffn_cfg": FFN}}
CROSS = {"num_layers": 2, "layer_cfg": {"self_attn_cfg": ATTENTION, "cross_attn_cfg": ATTENTION, "ffn_cfg": FFN}}
DETR = {
    "backbone": THREE,
    "neck": {"in_channels": [48, 96, 192], "out_channels": 16, "norm_cfg": GROUPS},
    "encoder": LAYERS,
    "decoder": CROSS,
    "positional_encoding": {"num_feats": 8},
    "bbox_head": {"embed_dims": 16},
    "num_queries": 12,
    "test_cfg": {"max_per_img": 20},
}
MASK2FORMER = {
    "backbone": SWIN,
    "data_preprocessor": {"batch_augments": None},  # it pads to 1024 x 1024
    "panoptic_head": {
        "in_channels": [24, 48, 96, 192],
        "feat_channels": 16,
        "out_channels": 16,
        "num_queries": 12,
        "pixel_decoder": {"norm_cfg": GROUPS, "encoder": LAYERS, "positional_encoding": {"num_feats": 8}},
        "positional_encoding": {"num_feats": 8},
        "transformer_decoder": CROSS,
    },
    "train_cfg": {"num_points": 200},
    "test_cfg": {"max_per_image": 20},
}

# --- the detectors -------------------------------------------------------------------------------------------------

# The heads of the big ones are as they are; they see fewer boxes, and show those of low scores.
TWO_STAGES = {
    "train_cfg": {"rcnn": {"sampler": {"num": 16}}},
    "test_cfg": {"rpn": {"max_per_img": 20}, "rcnn": SHOW_ALL},
}
EVERY_PATH = {"backbone": {"drop_path_rate": 0.0}}  # a sublayer that both images skip would not move
OURS = {
    "digits_swin": {"test_cfg": SHOW_ALL},
    "digits_vit": {"test_cfg": SHOW_ALL},
    "faster_rcnn_swin_t": TWO_STAGES | EVERY_PATH,
    "mask_rcnn_swin_t": TWO_STAGES | EVERY_PATH,
    "mask_rcnn_vit_s": TWO_STAGES,
    "retinanet_pvt_v2_b0": {"test_cfg": SHOW_ALL} | EVERY_PATH,
}
THEIRS = {
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": RCNN | {"roi_head": CUT | {"bbox_head": BOX_HEAD}},
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py": RCNN
    | {"roi_head": CUT | {"bbox_head": {"0": BOX_HEAD, "1": BOX_HEAD, "2": BOX_HEAD}}},
    "retinanet/retinanet_r50_fpn_1x_coco.py": LAST_MAPS | {"bbox_head": HEAD, "test_cfg": SHOW_ALL},
    "atss/atss_r50_fpn_1x_coco.py": LAST_MAPS | {"bbox_head": HEAD | {"norm_cfg": GROUPS}, "test_cfg": SHOW_ALL},
    # Two necks, and deformable convolutions.
    "dyhead/atss_r50_fpn_dyhead_1x_coco.py": {
        "backbone": THREE,
        "neck": {"0": LAST_MAPS["neck"], "1": {"in_channels": 16, "out_channels": 32, "num_blocks": 1}},
        "bbox_head": {"in_channels": 32, "feat_channels": 32},
        "test_cfg": SHOW_ALL,
    },
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": LAST_MAPS
    | {"bbox_head": HEAD | {"norm_cfg": GROUPS}, "test_cfg": SHOW_ALL},
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": DETR,
    "dino/dino-4scale_r50_8xb2-12e_coco.py": DETR | {"dn_cfg": {"group_cfg": {"num_dn_queries": 8}}},
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py": MASK2FORMER,
}
BIG = ("faster_rcnn_swin_t", "mask_rcnn_swin_t", "mask_rcnn_vit_s")
CASES = {name: (OWN / f"{name}.py", changes, SQUARE) for name, changes in OURS.items()}
CASES |= {name.split("/")[0]: (MMDET / name, changes, SMALL) for name, changes in THEIRS.items()}
PARAMS = [pytest.param(name, marks=pytest.mark.slow if name in BIG else ()) for name in CASES]


def build(path, changes, size):
    """A detector with no parameter at its start, its config and the size of its images."""
    torch.manual_seed(0)
    config = read_config(path, {"model": changes})
    return SimpleNamespace(detector=shake(build_detector(config)).eval(), config=config, size=size)


@pytest.fixture(scope="module", params=PARAMS)
def made(request):
    made = build(*CASES[request.param])
    made.name = request.param
    made.space = detector_space(made.detector, made.config.model, (3, *made.size))
    return made


def batch(size, images=2):
    """Images with boxes, masks and labels, as a data loader gives them: two objects in the first, one in the second."""
    generator, samples = torch.Generator().manual_seed(3), []
    for i in range(images):
        boxes = BOXES[: 2 - i]
        masks = np.zeros((len(boxes), *size), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = 1
        meta = {"img_id": i, "img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.arange(len(boxes)),
            masks=BitmapMasks(masks, *size),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    inputs = [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for _ in range(images)]
    return {"inputs": inputs, "data_samples": samples}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def found(detector, size):
    data = detector.data_preprocessor(batch(size, 1), False)
    return detector(**data, mode="predict")


def test_the_backbone_and_the_neck_are_sliced(made):
    detector, space, size = made.detector, made.space, made.size
    widths = [d for d in space.dimensions.values() if d.kind == "width"]
    # Mask2Former has no neck, and its head reads the maps.
    assert widths and {d.fixed for d in widths} == {made.name == "mask2former"}
    plan = random_plan(space, 0, INNER_KINDS)
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = mask_model(detector, plan).extract_feat(image)
        seen = slice_model(detector, plan).extract_feat(image)
        assert len(seen) == len(expected) > 1
        for one, other, dense in zip(seen, expected, detector.extract_feat(image), strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(one, dense, rtol=1e-2, atol=1e-2)
    costs = PlanCosts(whole(space))
    for kinds in (INNER_KINDS, KINDS):
        plan = random_plan(space, 1, kinds)
        pruned = slice_model(detector, plan)
        assert parameters(pruned) == costs.of(np.array([plan.sizes[n] for n in costs.names])).tolist()[0]
        assert parameters(pruned.backbone) < 0.7 * parameters(detector.backbone)
        neck, dense_neck = (parameters(d.neck) if d.with_neck else 0 for d in (pruned, detector))
        follows = kinds == KINDS and made.name != "mask2former"
        assert neck < dense_neck if follows else neck == dense_neck


def test_one_step_of_training_moves_every_weight_of_the_pruned_backbone(made):
    pruned = slice_model(made.detector, random_plan(made.space, 0)).train()
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    losses = pruned(**pruned.data_preprocessor(batch(made.size), True), mode="loss")
    total, logged = pruned.parse_losses(losses)
    assert len(logged) > 2 and all(torch.as_tensor(value).isfinite() for value in logged.values()), logged
    assert total > 0
    total.backward()
    after = dict(pruned.named_parameters())
    assert [n for n, p in after.items() if p.grad is None] == []
    assert [n for n, p in after.items() if not p.grad.isfinite().all()] == []
    optimizer.step()
    assert [n for n, p in after.items() if n.startswith(BACKBONE) and torch.equal(p, before[n])] == []
    assert all(p.isfinite().all() for p in after.values())


def test_a_pruned_detector_predicts(made):
    pruned = slice_model(made.detector, random_plan(made.space, 0))
    (sample,) = found(pruned, made.size)
    assert isinstance(sample, DetDataSample)
    objects = sample.pred_instances
    height, width = made.size
    assert len(objects) > 0 and objects.bboxes.shape == (len(objects), 4)
    assert objects.bboxes.isfinite().all() and objects.scores.isfinite().all()
    assert (objects.bboxes >= 0).all() and (objects.bboxes <= objects.bboxes.new_tensor([width, height] * 2)).all()
    assert (objects.labels >= 0).all() and (objects.labels < 80).all()
    assert ("masks" in objects) == made.name.startswith("mask")
    if "masks" in objects:
        assert objects.masks.shape == (len(objects), height, width)


def test_a_pruned_detector_is_saved_and_loaded(made, tmp_path):
    pruned = slice_model(made.detector, random_plan(made.space, 0))
    save_detector(pruned, made.config, tmp_path, [str(i) for i in range(80)])
    loaded, config = load_detector(tmp_path)
    assert config.model.backbone.type == "SlicedBackbone"
    (expected,), (seen,) = found(pruned, made.size), found(loaded, made.size)
    for name in ("bboxes", "scores", "labels"):
        assert torch.equal(seen.pred_instances[name], expected.pred_instances[name])


# --- operators that torchvision does not have ----------------------------------------------------------------------

TWO = RCNN | {"roi_head": CUT | {"bbox_head": BOX_HEAD}}
POOL = {"roi_layer": {"output_channels": 16}, "out_channels": 16}
ONCE = {"bbox_roi_extractor": POOL, "bbox_head": BOX_HEAD}
REFUSED = {
    "carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py": (TWO, "carafe_forward"),
    "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py": (RCNN | {"roi_head": ONCE}, "deform_roi_pool_forward"),
    "guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py": (LAST_MAPS | {"bbox_head": HEAD}, "masked_im2col_forward"),
}


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: name.split("/")[0])
def test_a_missing_operator_is_named_when_it_is_called(name, refused):
    changes, operator = REFUSED[name]
    detector = build(MMDET / name, changes, SMALL).detector  # building is no reason to refuse
    assert detector.backbone(torch.randn(1, 3, *SMALL))[0].isfinite().all()
    with refused(f"mmcv's operator {operator!r} is not in torchvision", "pip install"), torch.no_grad():
        found(detector, SMALL)
