"""The search stage on a detector's own loss: by a config alone, by SiDT's settings, and resumed."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from small_detector import small_config, small_digits
from torch.testing import assert_close

from sidt.detection.data.sources import move_data
from sidt.detection.detectors.configs import build_detector, input_size_of, read_config
from sidt.detection.detectors.space import detector_space
from sidt.detection.runs.objective import images_of, measured_scores
from sidt.detection.runs.settings import Settings
from sidt.detection.training.gates import GateHook
from sidt.detection.training.loop import prepared, train
from sidt.detection.training.loss import detector_loss, read_batches
from sidt.importance.gates import gated
from sidt.importance.scores import load_importance
from sidt.space.families import KINDS

HOOK = """
train_cfg = dict(max_epochs=2, val_interval=10)
custom_imports = dict(imports=["sidt.detection.models", "sidt.detection.training.gates"], allow_failed_imports=False)
custom_hooks = [dict(type="GateHook", lambdas=1e-2, speed=5.0)]
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of a detector that fits into a second, with nothing of SiDT's but the hook."""
    folder = tmp_path_factory.mktemp("small")
    small_digits(folder)
    return small_config(folder, HOOK)


def opened(config):
    found = read_config(config)
    move_data(found, config.parent / "digits")
    return found


class Witness(Hook):
    """Sees a training between the GateHook and the end, and stops it after an epoch if asked to."""

    priority = "VERY_LOW"
    stop = False

    def __init__(self):
        self.seen = {}

    def before_train(self, runner):
        model = runner.model
        self.seen["start"] = gate_values(model)
        decayed = [g for g in runner.optim_wrapper.param_groups if g["weight_decay"]]
        self.seen["decayed"] = {id(p) for group in decayed for p in group["params"]}
        self.seen["ids"] = {id(p) for p in model.sidt_gates.parameters()}
        self.seen["lr"] = {group["lr"] for group in runner.optim_wrapper.param_groups}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.setdefault("losses", []).append(float(outputs["loss_gates"]))

    def after_train_epoch(self, runner):
        self.seen["gated"] = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
        if type(self).stop:
            raise KeyboardInterrupt


@HOOKS.register_module()
class FirstWitness(Witness):
    """One that a config can name."""

    last = None

    def __init__(self):
        super().__init__()
        type(self).last = self


def gate_values(model):
    return {name: p.detach().clone() for name, p in model.sidt_gates.named_parameters()}


def started(config, folder):
    own = prepared(opened(config), folder, "none")
    own.custom_hooks = [*own.custom_hooks, {"type": "FirstWitness"}]
    return Runner.from_cfg(own)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    FirstWitness.stop = False
    runner = started(config, folder)
    keys = list(runner.model.state_dict())
    runner.train()
    return runner, keys, FirstWitness.last.seen, folder


def test_a_config_alone_trains_gates(trained, config):
    runner, _, seen, folder = trained
    assert all(tensor.eq(1).all() for tensor in seen["start"].values())
    units = sum(tensor.numel() for tensor in seen["start"].values())
    assert seen["losses"][0] == pytest.approx(1e-2 * units, rel=1e-5)  # as the penalty of gates of one
    assert seen["losses"][-1] < seen["losses"][0]
    space = detector_space(runner.model, opened(config).model, (3, 96, 96))
    scores = load_importance(folder / "scores.safetensors", space).scores
    assert all(scores[d.name].std() > 0 for d in space.dimensions.values() if d.kind in ("v", "mlp"))


def test_gates_are_optimised_without_decay_and_by_the_schedule(trained):
    seen = trained[2]
    assert seen["decayed"] and not seen["decayed"] & seen["ids"]
    assert len(seen["lr"]) == 1 and max(seen["lr"]) == pytest.approx(1.5e-3 * 0.01, rel=0.2)  # the warm-up's start


def test_the_model_is_left_folded(trained, config):
    runner, keys, seen, _ = trained
    assert list(runner.model.state_dict()) == keys and not hasattr(runner.model, "sidt_gates")
    assert not runner.model._forward_hooks
    state, gated_state = runner.model.state_dict(), seen["gated"]
    hidden = 1 + 5.0 * (gated_state["sidt_gates.hidden-0-0"] - 1)
    name = "backbone.stages.0.blocks.0.ffn.layers.1.weight"
    assert_close(state[name], gated_state[name] * hidden)
    assert not torch.equal(state[name], gated_state[name])
    assert torch.equal(state["bbox_head.atss_cls.weight"], gated_state["bbox_head.atss_cls.weight"])


def test_a_stopped_training_goes_on_with_its_gates(config, tmp_path):
    own = opened(config)
    own.custom_hooks = [*own.custom_hooks, {"type": "FirstWitness"}]
    FirstWitness.stop = True
    with pytest.raises(KeyboardInterrupt):
        train(own, None, tmp_path, "gates")
    before = {k.removeprefix("sidt_gates."): v for k, v in FirstWitness.last.seen["gated"].items() if "sidt_gates" in k}
    FirstWitness.stop = False
    last = train(own, None, tmp_path, "gates")
    after = FirstWitness.last.seen["start"]
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, before[name]) and not tensor.eq(1).all() for name, tensor in after.items())
    assert (last.parent / "scores.safetensors").is_file()


@pytest.mark.parametrize("outside", [False, True], ids=["backbone", "all"])
@pytest.mark.parametrize("placement", ["sidt", "vtp", "vit-slim"])
def test_gates_of_a_whole_detector(config, placement, outside):
    own = opened(config)
    torch.manual_seed(0)
    detector = build_detector(own).eval()
    (batch,) = read_batches(own, 2, batch_size=2)
    with torch.no_grad():
        before = detector_loss(detector, batch)
        gates = gated(
            detector,
            detector_space(detector, own.model, input_size_of(own), outside=outside),
            placement=placement,
            kinds=KINDS,
        )
        assert detector_loss(detector, batch) == before
        for parameter in gates.gates.values():
            parameter.copy_(1 + 0.5 * torch.rand_like(parameter))
        moved = detector_loss(detector, batch)
        gates.remove(fold=True)
        assert moved != before
        assert_close(detector_loss(detector, batch), moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", ["backbone", "detector"])
def test_settings_give_scores_and_leave_the_detector(config, on):
    own = opened(config)
    own.custom_hooks = []
    torch.manual_seed(0)
    detector = build_detector(own)
    space = detector_space(detector, own.model, input_size_of(own), outside=on == "detector")
    state = copy.deepcopy(detector.state_dict())
    said = []
    chosen = Settings(score="gates", on=on, gates={"lambdas": 1e-2, "speed": 5.0})
    scores = measured_scores(detector, own, chosen, space, images_of(own, chosen), said.append).scores
    assert all(np.ptp(scores[d.name]) > 0 for d in space.dimensions.values() if d.kind in ("mlp", "channels"))
    assert "gates" in said[-1]
    assert list(detector.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())


def test_a_runner_without_a_config_is_refused(refused):
    with refused("GateHook", "config"):
        GateHook(lambdas=1.0).before_run(SimpleNamespace(cfg={}))
    assert Settings(score="gates").gates.lambdas > 0
