"""The search stage on a detector's own loss, as a hook that any MMEngine config can name."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from sidt.detection.detectors.configs import input_size_of
from sidt.detection.detectors.space import detector_space
from sidt.errors import InputError
from sidt.importance.gates import Gates, gated
from sidt.importance.placements import Placement
from sidt.space.families import INNER_KINDS, Kind


@HOOKS.register_module()
class GateHook(Hook):
    """Trains gates of a detector's units together with its weights, on the detector's losses and ``loss_gates``.

    Training starts from ``load_from``, or from the weights of the config's ``init_cfg``. It ends with the scores,
    ``scores.safetensors``, and with the gates folded into the weights of the runner's model. Checkpoints in between
    hold weights and gates apart (``sidt_gates.*``); a resumed training goes on with both.

    Args:
        lambdas: the penalty's weight, for all kinds or by kind.
        speed: how many times as fast as weights gates move, under Adam and its kind (SGD: its square).
        placement: see :func:`sidt.importance.gates.gated`.
        kinds: the kinds of dimensions that get gates.
        out: where the scores go; default: ``scores.safetensors`` in the runner's work folder.
        outside: whether the channels of neck and heads get gates, too, as the units of the backbone do.

    Raises:
        InputError: when training starts: the backbone has no space, or the runner was not made from a config.
    """

    priority = "VERY_HIGH"  # what others make of the model, such as moving averages, shall have the gates

    def __init__(
        self,
        lambdas: float | Mapping[Kind, float],
        speed: float = 1.0,
        placement: Placement = "sidt",
        kinds: tuple[Kind, ...] = INNER_KINDS,
        out: str | None = None,
        outside: bool = False,
    ) -> None:
        """Take the settings; the gates are made when training starts."""
        self.lambdas, self.speed, self.placement, self.kinds = lambdas, speed, placement, tuple(kinds)
        self.out, self.outside = None if out is None else Path(out), outside
        self.gates: Gates | None = None

    def before_run(self, runner: Runner) -> None:
        """Register the gates, before weights are loaded, with the optimiser and, if there is one, the wrapper."""
        config = runner.cfg
        if not isinstance(config.get("optim_wrapper"), Mapping) or not isinstance(config.get("model"), Mapping):
            raise InputError("GateHook needs a runner made from a config, with model and optim_wrapper")
        wrapped = is_model_wrapper(runner.model)
        detector: nn.Module = runner.model.module if wrapped else runner.model
        space = detector_space(detector, config.model, input_size_of(config), outside=self.outside)
        # They act only once weights are there: MMEngine's initialisers write to what they read.
        self.gates = gated(detector, space, placement=self.placement, kinds=self.kinds, speed=self.speed, attach=False)
        if wrapped:  # it shares the gradients of the parameters it was made with
            runner.model = runner.wrap_model(copy.deepcopy(config.get("model_wrapper_cfg")), detector)
        optimizer = copy.deepcopy(config.optim_wrapper)
        special = optimizer.get("paramwise_cfg") or {}
        keys = {"sidt_gates": {"decay_mult": 0.0}, **(special.get("custom_keys") or {})}
        optimizer["paramwise_cfg"] = {**special, "custom_keys": keys}
        runner.optim_wrapper = runner.build_optim_wrapper(optimizer)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if config.get("param_scheduler") is not None:
            runner.param_schedulers = runner.build_param_scheduler(config.param_scheduler)

    def before_train(self, runner: Runner) -> None:
        """Put the gates to work."""
        assert self.gates is not None
        self.gates.attach()
        self.handle = self.gates.model.register_forward_hook(self._add_loss, with_kwargs=True)

    def after_train(self, runner: Runner) -> None:
        """Write the scores, and leave a detector without gates."""
        assert self.gates is not None
        if is_main_process():
            self.gates.scores().save(self.out or Path(runner.work_dir) / "scores.safetensors")
        self.handle.remove()
        self.gates.remove(fold=True)
        self.gates = None

    def _add_loss(self, detector: nn.Module, args: Any, kwargs: Mapping[str, Any], losses: Any) -> Any:
        """The losses with one more; predictions as they are."""
        if kwargs.get("mode") != "loss" or self.gates is None:
            return losses
        return {**losses, "loss_gates": self.gates.penalty(self.lambdas)}
