"""The dense detector as teacher: what the hook adds to the losses, that it leaves, and a run by the command line."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from backbones import random_plan
from click.testing import CliRunner
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from safetensors.torch import load_file
from small_detector import small_config, small_digits
from torch.testing import assert_close

from sidt.cli.commands import cli
from sidt.detection.data.sources import move_data
from sidt.detection.detectors.checkpoints import load_detector, save_detector
from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.detectors.space import detector_space
from sidt.detection.runs import pipeline
from sidt.detection.runs.folder import open_run
from sidt.detection.training.distillation import TeacherHook
from sidt.detection.training.loss import read_batches
from sidt.space.plan import DimensionPlan
from sidt.surgery.slicing import slice_model

REST = """
param_scheduler = []
default_hooks = dict(logger=dict(interval=1))
sidt = dict(holdout=4, finetune={"_delete_": True, "optim_wrapper.optimizer.lr": 1e-4})
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose detector is sliced, in width too, and not fine-tuned yet."""
    folder = tmp_path_factory.mktemp("run")
    small_digits(folder)
    config = read_config(small_config(folder, REST))
    move_data(config, folder / "digits")
    torch.manual_seed(0)
    detector = build_detector(config)
    detector.init_weights()
    save_detector(detector, config, folder / "dense", tuple("0123456789"))
    space = detector_space(detector, config.model, (3, 64, 64))
    plan = random_plan(space, seed=1)
    assert plan.sizes["embed.2"] < space.sizes["embed.2"]
    save_detector(slice_model(detector, plan), config, folder / "sliced", tuple("0123456789"))
    return folder


@pytest.fixture
def batch(run):
    return read_batches(read_config(run / "dense" / "config.py"), 4, batch_size=4)[0]


def losses_of(detector, batch):
    return detector(**detector.data_preprocessor(copy.deepcopy(batch), True), mode="loss")


def runner_of(model, run, name="dense"):
    return SimpleNamespace(model=model, cfg=read_config(run / name / "config.py"))


def gradients(detector, losses):
    return torch.autograd.grad(detector.parse_losses(losses)[0], list(detector.parameters()))


def hooks_of(detector):
    return [hook for module in detector.modules() for hook in module._forward_hooks]


def test_a_teacher_that_is_the_student_adds_nothing(run, batch):
    student, _ = load_detector(run / "dense")
    student.train()
    before, keys = losses_of(student, batch), list(student.state_dict())
    hook, runner = TeacherHook(str(run / "dense"), features=10), runner_of(student, run)
    torch.manual_seed(5)
    hook.before_train(runner)
    assert torch.initial_seed() == 5 and torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))
    after = losses_of(student, batch)
    assert set(after) == {*before, "loss_teacher"} and after["loss_teacher"].abs() < 1e-6
    for seen, wanted in zip(gradients(student, after), gradients(student, before), strict=True):
        assert_close(seen, wanted, atol=1e-6, rtol=1e-4)
    assert not hook.teacher.training and all(p.grad is None and not p.requires_grad for p in hook.teacher.parameters())
    data = student.data_preprocessor(copy.deepcopy(batch), False)
    assert len(student.eval()(**data, mode="predict")) == 4
    assert list(student.state_dict()) == keys
    hook.after_train(runner)
    assert not hooks_of(student) and set(losses_of(student, batch)) == set(before)


def test_the_loss_is_one_minus_the_correlation_of_every_channel(run, batch):
    student, teacher = (load_detector(run / name)[0] for name in ("sliced", "dense"))
    images = student.data_preprocessor(copy.deepcopy(batch), True)["inputs"]
    apart = [
        torch.stack([1 - torch.corrcoef(torch.stack([m[:, c].flatten() for m in pair]))[0, 1] for c in range(16)])
        for pair in zip(student.extract_feat(images), teacher.extract_feat(images), strict=True)
    ]
    hook = TeacherHook(str(run / "dense"), features=3)
    hook.before_train(runner_of(student, run))
    found = losses_of(student.train(), batch)["loss_teacher"]
    assert len(apart) == 2 and found > 0.01
    assert_close(found, 3 * sum(one.mean() for one in apart), atol=1e-3, rtol=1e-3)


def test_a_neck_with_fewer_channels_learns_what_it_has(run, batch, tmp_path):
    """The correlations are with the teacher's channels that the student kept."""
    teacher, config = load_detector(run / "dense")
    space = detector_space(teacher, config.model, (3, 64, 64), outside=True)
    kept = [1, 2, 3, 5, 8, 13]
    plan = DimensionPlan(space, {"neck.fpn_convs.0.conv": kept, "neck.lateral_convs.0.conv": range(1, 16)})
    save_detector(slice_model(teacher, plan), config, tmp_path / "sliced", tuple("0123456789"))
    student, _ = load_detector(tmp_path / "sliced")
    images = student.data_preprocessor(copy.deepcopy(batch), True)["inputs"]
    maps = [d.extract_feat(images) for d in (student, teacher)]
    pairs = [[(mine[:, i], theirs[:, c]) for i, c in enumerate(kept)] for mine, theirs in zip(*maps, strict=True)]
    apart = [
        torch.stack([1 - torch.corrcoef(torch.stack([m.flatten() for m in pair]))[0, 1] for pair in own])
        for own in pairs
    ]
    hook = TeacherHook(str(run / "dense"), features=3)
    hook.before_train(runner_of(student, tmp_path, "sliced"))
    found = losses_of(student.train(), batch)["loss_teacher"]
    assert_close(found, 3 * sum(one.mean() for one in apart), atol=1e-3, rtol=1e-3)


def test_a_wrapped_student_learns(run, batch):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        student = load_detector(run / "sliced")[0].train()
        wrapped = MMDistributedDataParallel(student, device_ids=None)
        hook = TeacherHook(str(run / "dense"))
        hook.before_train(runner_of(wrapped, run))
        optimizer = OptimWrapper(torch.optim.AdamW(student.parameters(), lr=1e-3))
        found = [wrapped.train_step(copy.deepcopy(batch), optimizer)["loss_teacher"].item() for _ in range(6)]
        assert found[-1] < found[0]
        hook.after_train(runner_of(wrapped, run))
        assert not hooks_of(wrapped)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_run_with_a_teacher_by_the_command_line(run):
    states = []
    for words in ([], ["--teacher"]):
        result = CliRunner().invoke(cli, ["detect", "finetune", str(run), *words], standalone_mode=False)
        assert result.exit_code == 0, result.exception
        (state,) = (run / "states").iterdir()
        (log,) = state.glob("*/vis_data/scalars.json")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        states.append((state.name, [record for record in records if "loss" in record]))  # the last is a validation
    (plain, without), (taught, records) = states
    assert plain != taught and not any("loss_teacher" in record for record in without)
    assert len(records) == 2 and all(record["loss_teacher"] > 0 for record in records)
    parts = [value for name, value in records[0].items() if name.startswith("loss_")]
    assert records[0]["loss"] == pytest.approx(sum(parts), rel=1e-4)
    assert "TeacherHook" not in (run / "config.py").read_text()
    tuned, sliced = (load_file(run / name / "model.safetensors") for name in (".", "sliced"))
    assert tuned.keys() == sliced.keys() and any(not torch.equal(tuned[name], sliced[name]) for name in sliced)
    # The flag is the hook in the config: the same training, which is finished.
    hook = {"type": "TeacherHook", "folder": str((run / "dense").resolve()), "features": 6.0}
    pipeline.finetune(open_run(run), {"custom_hooks": [hook]})
    assert [state.name for state in (run / "states").iterdir()] == [taught]


def test_the_settings_say_how_much(run):
    assert open_run(run).settings.teacher is None
    assert open_run(run, settings={"teacher": {"features": 2}}).settings.teacher.features == 2


def test_mistakes(run, batch, tmp_path, refused):
    with refused("features=0", "above 0"):
        TeacherHook(str(run), features=0)
    with refused("teacher.features", "greater than 0"):
        open_run(run, settings={"teacher": {"features": -1}})
    student = load_detector(run / "sliced")[0].train()
    with refused(tmp_path, "no detector"):
        TeacherHook(str(tmp_path)).before_train(runner_of(student, run))
    config = read_config(run / "dense" / "config.py", {"model.neck.out_channels": 8, "model.bbox_head.in_channels": 8})
    save_detector(build_detector(config), config, tmp_path / "other", tuple("0123456789"))
    TeacherHook(str(tmp_path / "other")).before_train(runner_of(student, run))
    with refused("[4, 8, 12, 12]", "[4, 16, 12, 12]"):
        losses_of(student, batch)
