"""Checkpoints: what is saved comes back, and what is damaged is refused whole."""

import argparse
import json
import os
import pickle

import pytest
import timm
import torch
from backbones import PVT, SWIN, TIMM_BACKBONES, VIT_TINY, dense, random_plan, sublayers
from safetensors.torch import save_file

import sidt
from sidt.export.weights import load_weights
from sidt.surgery.slicing import slice_model


@pytest.fixture
def saved(tmp_path):
    model, space = dense(VIT_TINY)
    small = slice_model(model, random_plan(space, 0))
    sidt.save(small, tmp_path / "small", args=VIT_TINY.kwargs | {"num_classes": 10})
    return small, tmp_path / "small"


@pytest.mark.parametrize("backbone", [b for b in TIMM_BACKBONES if b.label not in ("swiglu", "gated", "avg")], ids=str)
@pytest.mark.parametrize("empty", ["", "apart", "together"])
def test_round_trip(backbone, empty, tmp_path):
    model, space = dense(backbone)
    small = slice_model(model, random_plan(space, 1, empty=sublayers(space, empty) if empty else ()))
    sidt.save(small, tmp_path, args=backbone.kwargs | {"num_classes": 10})
    images = backbone.images()
    assert torch.equal(sidt.load(tmp_path)(images), small(images))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.1 * 4 * sum(p.numel() for p in model.parameters())


def test_a_dense_model_and_a_twice_sliced_one(tmp_path):
    model, space = dense(SWIN)
    sidt.save(model, tmp_path / "dense", args=SWIN.kwargs | {"num_classes": 10})
    images = SWIN.images()
    assert torch.equal(sidt.load(tmp_path / "dense")(images), model(images))
    once = slice_model(model, random_plan(space, 0))
    twice = slice_model(once, random_plan(sidt.space_for(once), 1))
    sidt.save(twice, tmp_path / "twice", args=SWIN.kwargs | {"num_classes": 10})
    assert torch.equal(sidt.load(tmp_path / "twice")(images), twice(images))


def test_arguments_that_the_model_knows_need_not_be_given(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, in_chans=1)
    sidt.save(model, tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["args"].items()
        >= {
            "num_classes": 7,
            "in_chans": 1,
            "img_size": [32, 32],
        }.items()
    )
    images = torch.randn(1, 1, 32, 32)
    assert torch.equal(sidt.load(tmp_path)(images), model.eval()(images))


def test_arguments_that_do_not_rebuild_the_model_are_refused(tmp_path, refused):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    with refused("does not rebuild", "args="):
        sidt.save(model, tmp_path, args={"num_classes": 3})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "plan.json", "model.safetensors"])
def test_truncated_or_missing_files(saved, name, refused):
    _, folder = saved
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with refused(folder / name):
        sidt.load(folder)
    (folder / name).unlink()
    with refused(folder):
        sidt.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preprocessing", "none"),
        ("preprocessing", {"mean": 0.5}),
        ("preprocessing", {"mean": [0.5, float("nan"), 0.5]}),
        ("preprocessing", {"std": [0.5, [0.5], 0.5]}),
        ("preprocessing", {"std": [0.5, 0, 0.5]}),
        ("preprocessing", {"crop_pct": -1}),
        ("preprocessing", {"crop_mode": None}),
        ("rotated", {"embed": 1}),
        ("rotated", [1]),
    ],
)
def test_a_config_that_says_what_cannot_be(saved, key, value, refused):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with refused(folder / "config.json", key):
        sidt.load(folder)


def test_weights_of_other_shapes_or_names(saved, refused):
    small, folder = saved
    state = {k: v.clone() for k, v in small.state_dict().items()}
    save_file(state | {"head.bias": torch.zeros(11)}, folder / "model.safetensors")
    with refused("head.bias", "[11]", "[10]"):
        sidt.load(folder)
    save_file(state | {"extra": torch.zeros(1)}, folder / "model.safetensors")
    with refused("extra"):
        sidt.load(folder)
    state.pop("head.bias")
    save_file(state, folder / "model.safetensors")
    with refused("head.bias is missing"):
        sidt.load(folder)


def test_plan_of_another_model(saved, tmp_path, refused):
    _, folder = saved
    random_plan(dense(PVT)[1], 0).save(folder / "plan.json")
    with refused("made for another model", "PyramidVisionTransformerV2"):
        sidt.load(folder)


def test_failed_save_leaves_the_old_checkpoint(saved, monkeypatch, refused):
    small, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with refused("No space left on device", "model.safetensors"):
        sidt.save(small, folder, args=VIT_TINY.kwargs | {"num_classes": 10})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_output_folder_that_cannot_be_made(saved, tmp_path, refused):
    small, _ = saved
    (tmp_path / "file").write_text("")
    with refused("cannot write", tmp_path / "file"):
        sidt.save(small, tmp_path / "file" / "folder", args=VIT_TINY.kwargs | {"num_classes": 10})


class _Code:
    def __reduce__(self):
        return (os.system, ("touch /tmp/sidt-was-here",))


def test_code_in_a_checkpoint_is_refused(tmp_path, refused):
    model, _ = dense(VIT_TINY)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(_Code()))
    torch.save({"state_dict": _Code()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with refused(name, "refused"):
            load_weights(model, tmp_path / name)
    assert not os.path.exists("/tmp/sidt-was-here")


def same(model, state):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


@pytest.mark.parametrize("key", [None, "state_dict", "model", "state_dict_ema", "model_ema"])
def test_weights_of_others(tmp_path, key):
    model, _ = dense(VIT_TINY)
    state = model.state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "weights.pth")
    other = VIT_TINY.build(seed=5)
    load_weights(other, tmp_path / "weights.pth")
    assert same(other, state)


def test_the_checkpoint_of_timms_training_script(tmp_path):
    """Arguments beside the weights, the moving average in a wrapper before them, as timm itself takes it."""
    model, _ = dense(VIT_TINY)
    last, average = VIT_TINY.build(seed=5).state_dict(), {f"module.{k}": v for k, v in model.state_dict().items()}
    whole = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": last, "state_dict_ema": average}
    torch.save(whole, tmp_path / "weights.pth.tar")
    other = VIT_TINY.build(seed=6)
    load_weights(other, tmp_path / "weights.pth.tar")
    assert same(other, model.state_dict())


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "model.backbone.", "net.module."]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_with_something_before_every_name(tmp_path, prefix, suffix):
    model, _ = dense(VIT_TINY)
    state = {f"{prefix}{k}": v for k, v in model.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    other = VIT_TINY.build(seed=5)
    load_weights(other, path)
    assert same(other, model.state_dict())


def test_weights_of_compiled_blocks(tmp_path):
    model, _ = dense(VIT_TINY)
    state = {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    other = VIT_TINY.build(seed=5)
    load_weights(other, tmp_path / "weights.pth")
    assert same(other, model.state_dict())


def test_what_stands_before_names_is_in_the_message(tmp_path, refused):
    model, _ = dense(VIT_TINY)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save(state | {"module.head.bias": torch.zeros(11)}, tmp_path / "other.pth")
    with refused("other.pth", "'module.'", "head.bias", "[11]"):
        load_weights(VIT_TINY.build(), tmp_path / "other.pth")
    torch.save({k: v for k, v in state.items() if "cls_token" not in k}, tmp_path / "part.pth")
    with refused("'module.'", "cls_token is missing"):
        load_weights(VIT_TINY.build(), tmp_path / "part.pth")
    more = {f"model.{k}": v for k, v in model.state_dict().items()} | {"criterion.weight": torch.zeros(1)}
    torch.save(more, tmp_path / "more.pth")
    with refused("cls_token is missing", f"{len(more) - 1} of its {len(more)} names begin with 'model.'"):
        load_weights(VIT_TINY.build(), tmp_path / "more.pth")


def test_unknown_model(refused):
    from sidt.export.models import create_model

    with refused("vit_enormous", "vit_"):
        create_model("vit_enormous", {})
    with refused("vit_tiny_patch16_224", "wings"):
        create_model("vit_tiny_patch16_224", {"wings": 2})
