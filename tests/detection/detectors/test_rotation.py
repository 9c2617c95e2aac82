"""The width of a detector's backbone, rotated: the neck gives the same maps, and reads fewer directions as well."""

import copy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backbones import shake
from mmdet.structures import DetDataSample
from mmengine.config import Config
from small_detector import CONFIGS

import sidt
from sidt.detection.detectors.checkpoints import load_detector, save_detector
from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.detectors.pyramid import only_layers
from sidt.detection.detectors.space import detector_space
from sidt.space.plan import DimensionPlan
from sidt.surgery.rotation import rotatable
from sidt.surgery.slicing import slice_model

SIZE = (3, 48, 48)  # a Swin pads its map of 3 x 3 to whole windows
HEAD = {"in_channels": 16, "feat_channels": 16, "norm_cfg": {"num_groups": 4}}
STRIDES = {"anchor_generator": {"strides": [8, 16, 32]}}
BACKBONE = {"embed_dims": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 4), "window_size": 4}
NECK = {"in_channels": [32, 64], "out_channels": 16, "num_outs": 3, "add_extra_convs": "on_input"}
TIMM = {"type": "TimmBackbone", "model": "swin_tiny_patch4_window7_224", "_delete_": True, "out_indices": (1, 2)}
TIMM["args"] = {"img_size": 48, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 4), "window_size": 4}
VIT = {"args": {"img_size": 48, "embed_dim": 48, "depth": 2}}
PYRAMID = {"in_channels": 48, "out_channels": 16, "hidden_channels": 12, "scales": (4, 1, 0.5)}
CASES = {  # config, changes, and the widths that can be rotated
    "swin": ("digits_swin", {"backbone": BACKBONE, "neck": NECK, "bbox_head": HEAD | STRIDES}, ("embed.1", "embed.2")),
    "timm swin": ("digits_swin", {"backbone": TIMM, "neck": NECK, "bbox_head": HEAD | STRIDES}, ("embed.1", "embed.2")),
    "vit": ("digits_vit", {"backbone": VIT, "neck": PYRAMID, "bbox_head": HEAD | STRIDES}, ("embed",)),
}


def build(config, changes):
    """A detector in float64 with no parameter at its start, and its config."""
    torch.manual_seed(0)
    config = read_config(CONFIGS / f"{config}.py", {"model": changes})
    return shake(build_detector(config)).eval().double(), config


@cache
def made(name):
    """A detector whose neck applies layers alone, its space, images, and it aligned with its moments."""
    config, changes, widths = CASES[name]
    detector, config = only_layers(*build(config, changes))
    space = detector_space(detector, config.model, SIZE)
    batch = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    aligned, moments = sidt.align(detector, sidt.measure_moments(detector, [batch], forward=run, space=space))
    return SimpleNamespace(
        detector=detector, config=config, space=space, batch=batch, aligned=aligned, moments=moments, widths=widths
    )


@pytest.fixture(params=CASES)
def case(request):
    return made(request.param)


@torch.no_grad()
def run(detector, batch):
    return detector.extract_feat(batch)


def error(detector, case):
    """How far the neck's maps are from the dense ones."""
    pairs = zip(run(detector, case.batch), run(case.detector, case.batch), strict=True)
    return sum(float((seen - wanted).norm() / wanted.norm()) for seen, wanted in pairs)


def samples(count):
    meta = dict.fromkeys(("img_shape", "ori_shape", "batch_input_shape"), SIZE[1:]) | {"scale_factor": (1.0, 1.0)}
    return [DetDataSample(metainfo=meta) for _ in range(count)]


def kept(space, width, share=0.6):
    return DimensionPlan(space, {width: np.arange(int(share * space.sizes[width]))})


def test_the_aligned_detector_is_the_same(case):
    assert case.moments.space.rotated() == list(case.widths) == list(rotatable(case.space))
    assert detector_space(case.aligned, case.config.model, SIZE).rotated() == list(case.widths)
    moved = dict(case.aligned.named_parameters())
    for name, parameter in case.detector.named_parameters():
        assert moved[name].shape == parameter.shape
    assert error(case.aligned, case) <= 1e-9
    with torch.no_grad():
        said = [detector.bbox_head(run(detector, case.batch)) for detector in (case.detector, case.aligned)]
    for wanted, seen in zip(*([t for kind in heads for t in kind] for heads in said), strict=True):
        assert float((wanted - seen).abs().max()) <= 1e-9 * float(wanted.abs().max())
    boxes = [d.predict(case.batch, samples(4))[0].pred_instances for d in (case.detector, case.aligned)]
    for wanted, seen in zip(*([found.bboxes, found.scores] for found in boxes), strict=True):
        assert wanted.shape == seen.shape and float((wanted - seen).abs().max()) <= 1e-6


def test_the_neck_is_refitted(case):
    """Every layer that reads a narrower map; and one that lost nothing stays bit for bit."""
    for width in case.widths:
        plan = kept(case.moments.space, width)
        assert error(sidt.compensate(case.aligned, plan, case.moments), case) < 0.5 * error(
            slice_model(case.aligned, plan), case
        )
    same = sidt.compensate(case.aligned, DimensionPlan(case.moments.space, {}), case.moments)
    for name, tensor in case.aligned.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)


@pytest.mark.parametrize("reader", ["lateral_convs.1.conv", "fpn_convs.2.conv"])
def test_a_layer_of_the_neck_is_at_the_least_squares(reader):
    """On what it reads in the sliced detector, no other weights come much nearer to what it wrote; borders included."""
    case = made("swin")
    batch = torch.randn(160, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moments = sidt.measure_moments(case.aligned, [batch], forward=run, space=case.moments.space)
    plan = kept(moments.space, "embed.2", 0.9)
    read, written = [], []

    def see(_, given, out):
        read.append(given[0])
        written.append(out)

    for detector in (case.aligned, sidt.compensate(case.aligned, plan, moments)):
        layer = detector.neck.get_submodule(reader)
        with layer.register_forward_hook(see):
            run(detector, batch)
    patches = torch.nn.functional.unfold(read[1], layer.kernel_size, 1, layer.padding, layer.stride)
    rows = patches.transpose(1, 2).flatten(0, 1)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    assert len(rows) > rows.shape[1]
    targets, seen = (out.detach().flatten(2).transpose(1, 2).flatten(0, 1) for out in written)
    best = rows @ torch.linalg.lstsq(rows, targets).solution
    left, least = (float((out - targets).norm() / targets.norm()) for out in (seen, best))
    assert left < 2 * least


def test_the_first_directions_carry_the_most(case):
    """Half of a width, first units and last ones, each repaired by nothing."""
    for width in case.widths:
        size = case.space.sizes[width]
        first, last = (
            error(slice_model(case.aligned, DimensionPlan(case.space, {width: units})), case)
            for units in (np.arange(size // 2), np.arange(size // 2, size))
        )
        assert first < last


def test_an_aligned_detector_is_saved_sliced_and_loaded(case, tmp_path):
    plan = kept(case.moments.space, case.widths[-1])
    whole, small = copy.deepcopy(case.aligned).float(), sidt.compensate(case.aligned, plan, case.moments).float()
    for name, detector in {"small": small, "whole": whole}.items():
        save_detector(detector, case.config, tmp_path / name, tuple("0123456789"))
        back, config = load_detector(tmp_path / name)
        for wanted, seen in zip(run(detector, case.batch.float()), run(back, case.batch.float()), strict=True):
            assert torch.equal(wanted, seen)
        assert detector_space(back, config.model, SIZE).rotated() == list(case.widths)
    save_detector(case.detector, config, tmp_path / "whole", tuple("0123456789"))
    assert not hasattr(load_detector(tmp_path / "whole")[0], "sidt_rotated")


POOLED = {"backbone": VIT, "neck": PYRAMID, "bbox_head": HEAD | STRIDES}
SKIPPED = {"backbone": BACKBONE, "neck": NECK | {"start_level": 1, "num_outs": 1, "add_extra_convs": False}}


@pytest.mark.parametrize(
    ("config", "changes", "width", "words"),
    [
        ("digits_vit", POOLED, "embed", "max_pool2d"),
        ("digits_swin", SKIPPED, "embed.1", "what backbone.norm1 gives goes out"),
        ("digits_swin", SKIPPED, "embed.0", "patch_embed.norm changes the stream itself"),
        ("retinanet_pvt_v2_b0", {}, "embed.3", "changes the stream itself"),
    ],
)
def test_other_widths_stay_and_the_reason_is_said(config, changes, width, words):
    detector, config = build(config, changes)
    space = detector_space(detector, config.model, SIZE)
    assert words in space.streams[width]
    space = detector_space(detector, Config({**config.model.to_dict(), "neck": None}), SIZE)
    assert not rotatable(space)
    reads_maps = {name for name, dimension in space.dimensions.items() if dimension.fixed}
    assert reads_maps and all("not known" in space.streams[name] for name in reads_maps)


def test_a_pyramid_of_layers_alone_gives_the_same(tmp_path):
    detector, config = build("digits_vit", POOLED)
    changed, own = only_layers(detector, config)
    batch = torch.randn(2, *SIZE, dtype=torch.float64)
    for wanted, seen in zip(run(detector, batch), run(changed, batch), strict=True):
        assert torch.equal(wanted, seen)
    added = set(changed.state_dict()) - set(detector.state_dict())
    assert added == {"neck.levels.2.0.0.weight"} and "pooled_channels" not in config.model.neck
    assert only_layers(changed, own) == (changed, own)
