"""What a detection run says of bad checkpoints, annotations, images and settings, and that it leaves nothing behind."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from small_detector import CONFIGS, SEARCH, opened, small_config, small_digits, write_checkpoint

from sidt.cli.commands import main
from sidt.detection.data.annotations import write_subsets
from sidt.detection.runs import pipeline
from sidt.detection.runs.folder import open_run
from sidt.detection.training.loss import read_batches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory, data):
    return small_config(tmp_path_factory.mktemp("config"), SEARCH + f"data_root = {str(data)!r}\n")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, config):
    return write_checkpoint(tmp_path_factory.mktemp("weights"), config)


def test_a_missing_extra_says_the_command_that_installs_it(tmp_path):
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmdet", "mmcv", "mmengine"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["sidt", "detect", "search", "config.py"]
from sidt.cli.commands import main
from sidt.detection.data.annotations import write_subsets
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "--extra detection" in done.stderr
    assert done.stderr.startswith("sidt: ") and done.stderr.count("\n") == 1


def test_a_backbone_without_a_space_is_refused(tmp_path, data, refused):
    path = tmp_path / "resnet.py"
    path.write_text(
        f"_base_ = {str(CONFIGS / 'digits_swin.py')!r}\n"
        "model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18, out_indices=(1, 2)),"
        " neck=dict(in_channels=[128, 256]))\n"
    )
    with refused("no search space", "ResNet"):
        pipeline.train_dense(opened(path, data, tmp_path / "run"))
    assert not (tmp_path / "run" / "data").exists()


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def write_evil(path):
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))


def write_other(path):
    torch.save({"state_dict": {"backbone.weight": torch.zeros(3)}}, path)


def write_truncated(path):
    whole_file = path.with_suffix(".whole")
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, whole_file)
    path.write_bytes(whole_file.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_evil, ["refused"]),
        (write_other, ["backbone", "missing"]),
        (write_truncated, ["truncated"]),
        (lambda path: None, ["cannot read"]),
    ],
    ids=["code", "another model", "truncated", "missing"],
)
def test_bad_checkpoints_are_refused(write, words, config, data, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    write(path)
    with refused(str(path), *words):
        pipeline.take_checkpoint(opened(config, data, tmp_path / "run"), path)
    assert not (tmp_path / "evil").exists() and not (tmp_path / "run" / "dense").exists()


def test_training_does_not_start_from_code(config, data, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    write_evil(tmp_path / "weights.pth")
    options = {"load_from": str(tmp_path / "weights.pth")}
    with refused("weights.pth", "refused"):
        pipeline.train_dense(open_run(config, tmp_path / "run", options, data_root=data))
    assert not (tmp_path / "evil").exists() and not (tmp_path / "run" / "dense").exists()


def test_bad_annotations_are_refused(config, data, checkpoint, tmp_path, refused):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    annotations = copy / "annotations" / "train.json"
    text = annotations.read_text()

    def take():
        pipeline.take_checkpoint(opened(config, copy, tmp_path / "run"), checkpoint)

    annotations.write_text(text[: len(text) // 2])
    with refused("train.json", "not valid JSON"):
        take()
    annotations.write_text(text.replace('"name": "7"', '"name": "seven"').replace('"name":"7"', '"name":"seven"'))
    with refused("7"):
        take()
    annotations.unlink()
    with refused("train.json"):
        take()
    annotations.write_text(text)
    next((copy / "train").glob("*.png")).unlink()
    with refused("1 of the 24"):
        take()
    assert not (tmp_path / "run").exists()


def test_another_number_of_classes_is_refused(config, data, tmp_path, refused):
    run = open_run(config, tmp_path / "run", {"model.bbox_head.num_classes": 11}, data_root=data)
    with refused("num_classes=11", "10 classes"):
        pipeline.train_dense(run)


def test_wrong_settings_are_named(config, data, tmp_path, refused):
    with refused("sidt", "trials", "0"):
        opened(config, data, tmp_path, trials=0)
    with refused("no detection run"):
        open_run(tmp_path)
    with refused("there is no config"):
        open_run(tmp_path / "absent.py")
    path = tmp_path / "broken.py"
    path.write_text("model = dict(\n")
    with refused("broken.py"):
        open_run(path)


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sidt", "detect", "search", str(tmp_path / "absent.py")])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("sidt: there is no config") and said.count("\n") == 1


def test_damaged_images_are_named(config, data, tmp_path, refused):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    for path in (copy / "train").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with refused("image", str(copy)):
        read_batches(opened(config, copy, tmp_path / "run").config, 4, batch_size=2)


@pytest.mark.parametrize(  # OpenCV does not name an empty file, and Pillow names none
    ("workers", "kept", "backend"), [(0, 60, "cv2"), (1, 60, "cv2"), (0, 0, "cv2"), (1, 0, "pillow")]
)
@pytest.mark.slow
def test_a_damaged_image_is_named_by_every_step(config, data, checkpoint, tmp_path, refused, workers, kept, backend):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    options = {f"{part}_dataloader.num_workers": workers for part in ("train", "test")}
    options |= {f"{part}_dataloader.persistent_workers": False for part in ("train", "test", "val")}
    options |= {f"{part}_dataloader.dataset.pipeline.0.imdecode_backend": backend for part in ("train", "test")}
    run = open_run(config, tmp_path / "run", options, {"score_images": 24}, data_root=copy)
    pipeline.take_checkpoint(run, checkpoint)
    train = copy / "annotations" / "train.json"
    read = {"val": train.with_name("val.json"), "train": write_subsets(train, tmp_path, held=4, seed=0)["rest"]}
    for part, steps in {"val": ["evaluate"], "train": ["search", "train_dense"]}.items():
        damaged = copy / part / json.loads(read[part].read_text())["images"][2]["file_name"]
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:kept])
        for step in steps:
            with refused(f"cannot read the image {damaged}", ".json"):
                getattr(pipeline, step)(run, *([print] if step == "search" else []))
        damaged.write_bytes(whole)


def test_mixed_precision_needs_a_gpu_and_does_not_stay(
    config, data, checkpoint, tmp_path, monkeypatch, refused, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = ["--out", str(tmp_path / "run"), "--data-root", str(data)]
    monkeypatch.setattr(sys, "argv", ["sidt", "detect", "train", str(config), *run, "--amp"])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sidt:")]
    assert stopped.value.code == 2 and len(lines) == 1 and "--amp" in lines[0] and "CUDA" in lines[0]
    pipeline.take_checkpoint(opened(config, data, tmp_path / "run"), checkpoint)
    with refused("--amp", "CUDA"):
        amp = {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.loss_scale": "dynamic"}
        pipeline.train_dense(opened(config, data, tmp_path / "run"), amp)


def test_options_of_a_call_do_not_stay(config, data, checkpoint, tmp_path):
    run = opened(config, data, tmp_path / "run", trials=7, timeout=5.0, device="cpu", storage="sqlite:///x.db", seed=3)
    assert (run.settings.trials, run.settings.timeout, run.settings.device) == (7, 5.0, "cpu")
    pipeline.take_checkpoint(run, checkpoint)
    again = open_run(tmp_path / "run").settings
    assert (again.trials, again.timeout, again.device, again.storage) == (2, None, "auto", None)  # the config's
    assert again.seed == 3  # what was held out depends on it
