"""What a detection run says of bad checkpoints, annotations, images and settings, and that it leaves nothing behind."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from small_detector import CONFIGS, SEARCH, opened, small_config, small_digits, write_checkpoint

from sidt.cli.commands import main
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
    with refused("ResNet", "search_spaces"):
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
