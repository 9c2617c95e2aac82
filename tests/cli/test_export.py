"""``sidt export`` on a run folder, a checkpoint folder and a timm model, and what it refuses."""

import json
import re

import onnxruntime
import timm
import torch
from backbones import shake
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch.testing import assert_close

import sidt
from sidt.errors import InputError
from sidt.runs import exports

torch_file = torch.export.load


def rows(text):
    """The cells of each row, by the first."""
    table = [re.split(r"\s{2,}", line.strip()) for line in text.split("\n\n")[0].splitlines()]
    assert table[0][0] == "model"
    return {name: cells for name, *cells in table[2:]}


def test_a_run_gives_its_sliced_model_beside_the_dense_one(run, sidt_command):
    code, out, err = sidt_command("export", run, "--to", "onnx", "--dynamic-batch")
    assert code == 0, err
    found = rows(out)
    assert list(found) == ["dense", "sliced"] and str(run / "model.onnx") in out and "any batch of 3x16x16" in out
    dense, sliced = (int(cells[0].replace(",", "")) for cells in found.values())
    assert sliced < dense and (run / "model.onnx").stat().st_size == sliced
    assert all(float(cells[1]) > 0 and float(cells[2]) > 0 and float(cells[3]) < 1e-4 for cells in found.values())
    images = torch.randn(3, 3, 16, 16)
    session = onnxruntime.InferenceSession(run / "model.onnx")
    with torch.no_grad():
        expected = sidt.load(run / "sliced")(images)
    assert_close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected, rtol=1e-4, atol=1e-4)


def test_a_fine_tuned_run_and_a_checkpoint_leave_for_torch(run, sidt_command, tiny, tmp_path):
    tuned = tmp_path / "run"
    tuned.mkdir()
    (tuned / "config.yaml").write_text((run / "config.yaml").read_text())
    model = shake(sidt.load(run / "sliced"))
    sidt.save(model, tuned, **tiny["model"])
    code, out, err = sidt_command("export", tuned, "--to", "torch")
    assert code == 0, err
    assert list(rows(out)) == ["fine-tuned"] and (tuned / "model.pt2").is_file()
    code, out, err = sidt_command("export", run / "dense", "--to", "torch", "--out", tmp_path / "new" / "dense.pt2")
    assert code == 0 and list(rows(out)) == ["dense"], err
    image = torch.randn(1, 3, 16, 16)
    for file, expected in ((tuned / "model.pt2", model), (tmp_path / "new" / "dense.pt2", sidt.load(run / "dense"))):
        with torch.no_grad():
            assert_close(torch_file(file).module()(image), expected(image), rtol=1e-4, atol=1e-5)


def test_a_timm_model_by_name(sidt_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--random-weights", "--to", "torch", "--input", "3x64x64")
    code, out, err = sidt_command("export", "pvt_v2_b0", *small)
    assert code == 0 and (tmp_path / "pvt_v2_b0.pt2").is_file() and "3x64x64" in out, err


def test_a_timm_model_has_its_published_weights(mistake, tmp_path, monkeypatch):
    """Without a network they cannot be had, and a model of noise must not leave instead."""
    asked = []

    def no_network(repository, what):
        asked.append(repository)
        raise InputError(f"cannot reach the hub for {repository}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidt.export.models.ask_for_weights", no_network)
    repository = get_pretrained_cfg("vit_tiny_patch16_224").hf_hub_id
    mistake("export", "vit_tiny_patch16_224", says=["cannot reach the hub", repository])
    assert asked == [repository] and not list(tmp_path.iterdir())


def test_mistakes_are_one_line_and_leave_nothing(run, mistake, tmp_path, monkeypatch):
    out = tmp_path / "out.onnx"
    mistake("export", run, "--out", out, "--fp16", "--int8", says=["--fp16", "--int8"])
    mistake("export", run, "--out", out, "--opset", 9, says=["opset 9", "18"])
    mistake("export", run, "--out", out, "--to", "torch", "--opset", 18, says=["--to torch"])
    mistake("export", run, "--out", out, "--to", "tflite", says=["tflite"])
    mistake("export", run, "--out", out, "--input", "32", says=["--input", "32"])
    mistake("export", run, "--out", out, "--input", "3x8x8", says=["3x8x8"])
    mistake("export", run, "--out", out, "--random-weights", says=["--random-weights"])
    mistake("export", run, "--out", out, "--part", "detector", says=["--part detector", run])
    mistake("export", "no_such_model", "--out", out, says=["no_such_model"])
    mistake("export", run.parent, "--out", out, says=[run.parent, "config.json"])
    mistake("export", run, "--out", tmp_path, says=[tmp_path, "folder"])
    mistake("export", run, "--out", run / "config.yaml" / "x.onnx", says=["cannot write"])
    monkeypatch.setitem(exports.BOUNDS, "float32", 0.0)
    mistake("export", run, "--out", out, says=["differ", "nothing is written"])
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_sliced_says_the_step(run, mistake, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    mistake("export", tmp_path, says=["sidt slice"])
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_for_timm_alone(sidt_command, mistake, tmp_path):
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    scores = sidt.importance.random(model)
    for name, uniform in (("even", True), ("odd", False)):
        plan = sidt.allocate(scores, sidt.Budget(params=0.6), uniform=uniform)
        sidt.save(sidt.slice_model(model, plan), tmp_path / name)
    code, out, err = sidt_command("export", tmp_path / "even", "--to", "timm")
    assert code == 0 and "timm.create_model('vit_tiny_patch16_224'" in out, err
    folder = tmp_path / "even" / "timm"
    config = json.loads((folder / "config.json").read_text())
    alone = timm.create_model(config["architecture"], **config["model_args"]).eval()
    alone.load_state_dict(load_file(folder / "model.safetensors"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(alone(images), sidt.load(tmp_path / "even")(images), atol=1e-5)
    mistake("export", tmp_path / "odd", "--to", "timm", says=["does not take these sizes", "uniform"])
    mistake("export", tmp_path / "even", "--to", "timm", "--fp16", says=["--to timm takes --out alone"])
    mistake("export", tmp_path, "--to", "timm", says=["no run folder and no checkpoint"])
    assert not (tmp_path / "odd" / "timm").exists()
