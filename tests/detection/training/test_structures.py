"""Structures of a detector by the hook: reached by ADMM, held in training, and both after a stop."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from small_detector import random_detector, small_config, small_digits
from torch.testing import assert_close

from sidt.detection.data.sources import move_data
from sidt.detection.detectors.configs import read_config
from sidt.detection.training.loop import train
from sidt.detection.training.structures import StructuresHook
from sidt.sparsity.admm import parts_of
from sidt.sparsity.config import LayersConfig, structures_of

LAYERS = [
    {
        "layers": ["neck.fpn_convs.*.weight", "bbox_head.*_convs.*.conv.weight"],
        "structure": {"patterns": [{"patterns": 8}, {"tiles": {"rows": 1, "columns": 1}, "keep": 0.5}]},
    },
    {"layers": "neck.lateral_convs.*.weight", "structure": {"values": {"ternary": 0.05}}},
    {"layers": "backbone.stages.*.ffn.layers.0.0.weight", "structure": {"values": {"levels": 4}}},
]
ADMM = {"by": "admm", "rounds": 2, "rho": 5.0, "growth": 2.0, "train": {"epochs": 1}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_digits(folder)
    found = read_config(small_config(folder, "param_scheduler = []\ndefault_hooks = dict(logger=dict(interval=1))\n"))
    move_data(found, folder / "digits")
    return found


@pytest.fixture(scope="module")
def start(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.save(random_detector(config).state_dict(), path)
    return path


class Stopped(Exception):
    """A training that was stopped."""


class Watch(Hook):
    """Sees what detectors read as, and stops a training in its second epoch if asked to."""

    priority = "VERY_LOW"
    stop = False
    made = None

    def __init__(self):
        self.losses, self.read, self.detector = [], [], None
        Watch.made = self

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({n: float(value.detach()) for n, value in outputs.items() if "loss" in n})
        self.read.append({n: read(runner.model, n).detach().clone() for n in structures(runner.model)})
        if self.stop and runner.epoch == 1:
            raise Stopped

    def after_run(self, runner):
        self.detector = runner.model


def read(detector, name):
    """What a weight reads as."""
    return detector.get_submodule(name.removesuffix(".weight")).weight


def structures(detector):
    return structures_of(detector, [LayersConfig(**one) for one in LAYERS], None)


def trained(config, start, folder, reach, stop=False):
    """A training by its checkpoint, and what was seen of it."""
    own = copy.deepcopy(config)
    own.train_cfg.max_epochs, own.train_cfg.val_begin = 2, 3
    own.custom_hooks = [{"type": "StructuresHook", "structures": LAYERS, "reach": reach}, {"type": "Watch"}]
    HOOKS.register_module(name="Watch", module=Watch, force=True)
    Watch.stop = stop
    try:
        return state_of(train(own, start, folder, "t")), Watch.made
    finally:
        HOOKS.module_dict.pop("Watch")


@pytest.fixture(scope="module", params=[ADMM, None], ids=["admm", "held"])
def whole(config, start, tmp_path_factory, request):
    return request.param, *trained(config, start, tmp_path_factory.mktemp("whole"), request.param)


def state_of(path):
    return torch.load(path, weights_only=False)


@pytest.mark.slow
def test_a_stopped_training_goes_on_exactly(config, start, tmp_path, whole):
    reach, theirs, seen = whole
    with pytest.raises(Stopped):
        trained(config, start, tmp_path, reach, stop=True)
    ours, again = trained(config, start, tmp_path, reach)
    for part in ("state_dict", "sidt_structures"):
        assert ours[part].keys() == theirs[part].keys() and ours[part]
        for name, tensor in theirs[part].items():
            assert torch.equal(ours[part][name], tensor), name
    assert len(again.losses) == 3 and again.losses == seen.losses[3:]


def test_a_training_is_pulled_to_targets_or_held(config, start, whole):
    reach, checkpoint, seen = whole
    wanted, begin = structures(seen.detector), state_of(start)
    assert list(checkpoint["state_dict"]) == list(begin) == list(seen.detector.state_dict())
    assert not [hook for module in seen.detector.modules() for hook in module._forward_hooks]
    plain = {name: type(module) for name, module in random_detector(config).named_modules()}
    assert {name: type(module) for name, module in seen.detector.named_modules()} == plain
    if reach is None:
        assert not any("admm" in name for name in seen.losses[0])
        masks = {name: structure.mask(begin[name]) for name, structure in wanted.items()}
        assert all(torch.equal(checkpoint["sidt_structures"][name], mask) for name, mask in masks.items())
        for weights in (*seen.read, {name: seen.detector.get_parameter(name).detach() for name in wanted}):
            for name, structure in wanted.items():
                assert not weights[name][~masks[name]].any()
                assert_close(structure.rounded(weights[name], masks[name]), weights[name], atol=1e-6, rtol=1e-5)
        assert not any(torch.equal(seen.read[0][name], seen.read[-1][name]) for name in wanted)
        return
    gaps = [begin[n] - part.project(begin[n]) for n, structure in wanted.items() for part in parts_of(structure)]
    first = reach["rho"] / 2 * sum(gap.square().sum() for gap in gaps)
    assert_close(torch.tensor(seen.losses[0]["loss_admm"]), first, atol=1e-6, rtol=1e-4)
    pulls = [one["loss_admm"] for one in seen.losses]
    assert pulls[0] > pulls[1] > pulls[2] and pulls[3] > 1.5 * pulls[2]  # the next round pulls twice as hard
    assert {name.split(".")[0] for name in checkpoint["sidt_structures"]} == {"target", "dual"}


def test_mistakes_are_named(config, refused):
    with refused("StructuresHook: structures", "structure"):
        StructuresHook([{"layers": "a"}])
    with refused("StructuresHook: reach", "by", "magic"):
        StructuresHook(LAYERS, {"by": "magic"})
    with refused("projection", "admm, lasso"):
        StructuresHook(LAYERS, {"by": "projection"})
    detector = random_detector(config)
    runner = SimpleNamespace(model=detector, iter=0, epoch=0, train_loop=None)
    with refused("neck.nothing.weight"):
        StructuresHook([{"layers": "neck.nothing.weight", "structure": {}}]).before_train(runner)
    with refused("rounds of epochs", "NoneType"):
        StructuresHook(LAYERS, ADMM).before_train(runner)
    hook, runner.iter = StructuresHook(LAYERS), 3
    hook.after_load_checkpoint(runner, {"sidt_structures": {"target.0.a": torch.zeros(1)}})
    with refused("masks of other weights", "another work folder"):
        hook.before_train(runner)
