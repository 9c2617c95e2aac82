"""Dense training: one that was stopped goes on, whenever that was, and two processes train as one."""

import os
import subprocess
import sys

import pytest
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from safetensors.torch import load_file
from small_detector import small_config, small_digits
from torch.testing import assert_close

from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.runs import pipeline
from sidt.detection.runs.folder import open_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(tmp_path_factory.mktemp("config"))


@HOOKS.register_module()
class StopOnce(Hook):
    """Stops the first training that it sees after its first epoch, as Ctrl-C would."""

    armed = True

    def before_train_epoch(self, runner):
        if runner.epoch == 1 and type(self).armed:
            type(self).armed = False
            raise KeyboardInterrupt


def test_a_stopped_training_goes_on(config, data, tmp_path):
    hooks = {"custom_hooks": [{"type": "StopOnce"}], "default_hooks.checkpoint.interval": 1}
    options = {"train_cfg.max_epochs": 2, **hooks}
    stopped = open_run(config, tmp_path / "stopped", options, data_root=data)
    StopOnce.armed = True
    with pytest.raises(KeyboardInterrupt):
        pipeline.train_dense(stopped)
    assert not (tmp_path / "stopped" / "dense").exists()
    pipeline.train_dense(stopped)
    log = sorted((tmp_path / "stopped" / "states").glob("train-*/*/*.log"))[-1].read_text()
    assert "resumed epoch: 1" in log
    whole_run = open_run(config, tmp_path / "whole", options, data_root=data)
    pipeline.train_dense(whole_run)
    weights = [load_file(tmp_path / name / "dense" / "model.safetensors") for name in ("stopped", "whole")]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.parametrize("whole", [False, True], ids=["half-written", "not-begun"])
def test_a_training_killed_while_it_writes_goes_on(config, data, tmp_path, monkeypatch, whole):
    """MMEngine removes what it keeps no longer, then writes, and then names what it wrote."""
    options = {"train_cfg.max_epochs": 2, "default_hooks.checkpoint.max_keep_ckpts": 1}
    run = open_run(config, tmp_path / "run", options, data_root=data)
    written = LocalBackend.put

    def put(self, obj, filepath):
        if str(filepath).endswith("epoch_2.pth"):
            written(self, obj[: 0 if whole else len(obj) // 2], filepath)
            raise KeyboardInterrupt
        written(self, obj, filepath)

    with monkeypatch.context() as patched:
        patched.setattr(LocalBackend, "put", put)
        with pytest.raises(KeyboardInterrupt):
            pipeline.train_dense(run)
    (work,) = (tmp_path / "run" / "states").glob("train-*")
    if whole:  # and the name of the last one with it
        (work / "epoch_2.pth").unlink()
        (work / "last_checkpoint").write_text("")
    pipeline.train_dense(run)
    assert "resumed epoch: 1" in sorted(work.glob("*/*.log"))[-1].read_text()


@pytest.mark.slow
def test_two_processes_are_one(config, data, tmp_path):
    """Normalisers of the losses are means over the processes, so as many images in one step are the same step."""
    plain = ["train_cfg.max_epochs=1", "optim_wrapper.optimizer.type=SGD", "optim_wrapper.optimizer.lr=0.001"]
    plain += ["param_scheduler=[]", "model.backbone.drop_path_rate=0.0"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    found = {}
    for name, size, command in (("two", 2, torchrun), ("one", 4, [])):
        words = ["-m", "sidt", "detect", "train", str(config), "--out", name, "--data-root", str(data)]
        words += ["--launcher", "pytorch"] if command else []
        values = [*plain, f"train_dataloader.batch_size={size}"]
        options = [word for value in values for word in ("--cfg-options", value)]
        done = subprocess.run(
            [sys.executable, *command, *words, *options],
            capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = load_file(tmp_path / name / "dense" / "model.safetensors")
    log = next((tmp_path / "two" / "states").glob("train-*/*/*.log")).read_text()
    assert "GPU number: 2" in log and "MMDistributedDataParallel" in log
    start = build_detector(read_config(config))
    for name, tensor in found["one"].items():
        assert_close(found["two"][name], tensor, atol=1e-5, rtol=1e-5)
    assert any((tensor - start.state_dict()[name]).abs().max() > 1e-3 for name, tensor in found["one"].items())
