"""Training a sliced detector with the dense one as teacher, as a hook that any MMEngine config can name."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from sidt.detection.detectors.checkpoints import load_detector
from sidt.detection.detectors.configs import first_neck, input_size_of
from sidt.detection.detectors.sliced_parts import SLICED
from sidt.detection.detectors.space import map_channels
from sidt.errors import InputError
from sidt.files import read_json
from sidt.space.axes import kept_indices
from sidt.training.distillation import dissimilarity


@HOOKS.register_module()
class TeacherHook(Hook):
    """Adds ``loss_teacher`` to a detector's losses: how far its maps are from those of a teacher.

    The maps are the neck's, or the backbone's where there is no neck. The loss is PKD's (Cao et al. 2022): half the
    mean squared error of maps whose channels are normalised over the batch, which is one minus Pearson's correlation,
    summed over the maps. The teacher runs in eval mode, without gradients, on the images as the student gets them,
    and is no part of the student or of its checkpoints.

    Args:
        folder: the teacher, as ``sidt detect`` writes it (``RUN/dense``): ``config.py`` with ``model.safetensors``.
        features: weight of the loss; PKD takes 6 for detectors of two stages and 10 for those of one.

    Raises:
        InputError: ``features`` is not positive; when training starts, the folder is no detector; in the first
            iteration, the maps have other shapes than the student's.
    """

    def __init__(self, folder: str, features: float = 6.0) -> None:
        """Take the settings; the teacher is loaded when training starts."""
        if not features > 0:
            raise InputError(f"TeacherHook: features={features} must be above 0; drop the hook to train without it")
        self.folder, self.features = Path(folder), features
        self.teacher: Any = None
        self.handles: list[Any] = []
        self.maps: Sequence[Tensor] = ()
        self.kept: Sequence[Tensor | None] = ()  # of each map, the teacher's channels that the student has

    def before_train(self, runner: Runner) -> None:
        """Load the teacher, and listen to the student."""
        self.after_train(runner)
        detector = runner.model.module if is_model_wrapper(runner.model) else runner.model
        with torch.random.fork_rng(devices=[]):  # a detector draws its first weights: training goes on as without
            teacher, _ = load_detector(self.folder)
        self.teacher = teacher.requires_grad_(False).to(next(detector.parameters()).device)
        self.kept = _kept(detector, runner.cfg)
        maps = detector.neck if detector.with_neck else detector.backbone
        self.handles = [
            maps.register_forward_hook(self._keep),
            detector.register_forward_hook(self._add_loss, with_kwargs=True),
        ]

    def after_train(self, runner: Runner) -> None:
        """Leave the student as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.teacher, self.maps = [], None, ()

    def _keep(self, module: nn.Module, inputs: Any, maps: Sequence[Tensor]) -> None:
        self.maps = maps

    def _add_loss(self, detector: nn.Module, args: Any, kwargs: Mapping[str, Any], losses: Any) -> Any:
        """The losses with one more; predictions as they are."""
        mine, self.maps = self.maps, ()  # they hold on to the graph
        if kwargs.get("mode") != "loss":
            return losses
        with torch.no_grad():
            theirs = self.teacher.extract_feat(args[0] if args else kwargs["inputs"])
            theirs = [_only(m, k) for m, k in zip_longest(theirs, self.kept)]
        shapes = [[list(m.shape) for m in maps] for maps in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"the teacher {self.folder} gives maps of {shapes[1]}, the student of {shapes[0]}; its teacher must be "
                "the detector that it was sliced from"
            )
        apart = [dissimilarity(a, b, (0, 2, 3)) for a, b in zip(mine, theirs, strict=True)]
        return {**losses, "loss_teacher": self.features * torch.stack(apart).sum()}


def _kept(detector: nn.Module, config: Any) -> list[Tensor | None]:
    """Of each map of a sliced neck, the channels of the dense one that it has; ``None``: all."""
    if (first_neck(config.model)[0] or {}).get("type") != SLICED:
        return []
    plan = read_json(Path(config.model.backbone.plan))
    keep = {name: np.array(kept, dtype=np.int64) for name, kept in plan["keep"].items()}
    axes = map_channels(detector, input_size_of(config))
    return [None if a is None else torch.from_numpy(kept_indices(a, plan["dense"], keep, {})) for a in axes]


def _only(features: Tensor, kept: Tensor | None) -> Tensor:
    """The channels of a map that a student has; all, if it is not the map of what the student was sliced from."""
    if kept is None or int(kept[-1]) >= features.shape[1]:
        return features
    return features[:, kept.to(features.device)]
