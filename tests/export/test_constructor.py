"""Models of uniform sizes are timm's own: five lines of timm and safetensors load them."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from backbones import PVT, SWIN, SWIN_V2, TIMM_BACKBONES, VIT_TINY, dense, random_plan
from safetensors.torch import load_file

import sidt
from sidt.export import to_timm
from sidt.export.checkpoint import load
from sidt.space.families import KINDS
from sidt.surgery.slicing import slice_model

VITS = [
    b
    for b in TIMM_BACKBONES
    if b.label == ""
    and b.name.startswith(("vit_tiny", "deit", "vit_small"))
    and dense(b)[1].model == "VisionTransformer"
]


def uniform(backbone, share, **rules):
    """A model, aligned where it can be, cut to a uniform plan."""
    model, _ = dense(backbone)
    model, moments = sidt.align(model, sidt.measure_moments(model, [(backbone.images(4), torch.zeros(4))]))
    scores = sidt.importance.random(model, space=moments.space)
    return slice_model(model, sidt.allocate(scores, sidt.Budget(params=share), uniform=True, **rules))


@pytest.mark.parametrize("backbone", [*VITS, SWIN, PVT], ids=str)
def test_timm_alone_loads_what_is_uniform(backbone, tmp_path):
    small = uniform(backbone, 0.5, kinds=KINDS)  # PVT has widths that are not rotated
    made = to_timm(small, tmp_path)
    c = json.loads((tmp_path / "config.json").read_text())
    assert (c["architecture"], c["model_args"]) == (made["architecture"], json.loads(json.dumps(made["model_args"])))
    model = timm.create_model(c["architecture"], **c["model_args"])
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images = backbone.images()
    outputs = [m.eval()(images) for m in (model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True))]
    outputs.append(load(tmp_path)(images))
    for output in outputs:
        assert torch.allclose(output, small(images), atol=1e-4 * float(output.abs().max()))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in small.parameters())


def test_five_lines_in_a_process_without_sidt(tmp_path):
    small = uniform(VIT_TINY, 0.4)
    to_timm(small, tmp_path)
    torch.save(VIT_TINY.images(), tmp_path / "images.pt")
    lines = f"""if True:
        import json, sys, timm, torch
        from safetensors.torch import load_file
        config = json.load(open("{tmp_path}/config.json"))
        model = timm.create_model(config["architecture"], **config["model_args"]).eval()
        model.load_state_dict(load_file("{tmp_path}/model.safetensors"))
        torch.save(model(torch.load("{tmp_path}/images.pt")), "{tmp_path}/out.pt")
        assert "sidt" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = small(VIT_TINY.images())
    assert torch.allclose(torch.load(tmp_path / "out.pt"), expected, atol=1e-4 * float(expected.abs().max()))


def test_a_dense_model(tmp_path):
    model, _ = dense(VIT_TINY)
    to_timm(model, tmp_path)
    images = VIT_TINY.images()
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))


def test_the_size_that_timm_does_not_take_is_named(tmp_path, refused):
    model, space = dense(VIT_TINY)
    with refused("constructor", "heads.1 is 2 and heads.0 is 3", "uniform", "sidt.save"):
        to_timm(slice_model(model, sidt.DimensionPlan(space, {"heads.1": [0, 2]})), tmp_path / "a")
    halves = {f"qk.{i}": [list(range(32))] * 3 for i in (0, 1)}
    with refused("qk.0 is 32 and v.0 is 64"):
        to_timm(slice_model(model, sidt.DimensionPlan(space, halves)), tmp_path / "a")
    both = halves | {f"v.{i}": [list(range(32))] * 3 for i in (0, 1)}
    with refused("embed is 192", "3 heads of 32 are 96"):
        to_timm(slice_model(model, sidt.DimensionPlan(space, both)), tmp_path / "a")
    empty = {f"hidden.{i}": [] for i in (0, 1)}
    with refused("hidden.0 is 0"):
        to_timm(slice_model(model, sidt.DimensionPlan(space, empty)), tmp_path / "a")
    swin, windows = dense(SWIN)
    with refused("embed.1 is 95", "2 times embed.0"):
        to_timm(slice_model(swin, sidt.DimensionPlan(windows, {"embed.1": list(range(95))})), tmp_path / "a")
    cosine, plan = dense(SWIN_V2)[0], random_plan(dense(SWIN_V2)[1], 0)
    with refused("not known", "vit"):
        to_timm(slice_model(cosine, plan), tmp_path / "a")
    assert not (tmp_path / "a").exists()
