"""Retraining with the dense model as teacher: a loss that adds what the teacher says to what the labels say."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional

from sidt.errors import InputError
from sidt.space.axes import names
from sidt.space.outputs import classes_of, heads_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for
from sidt.training.digest import weights_digest
from sidt.training.loop import Loss

_EPS = 1e-6


class TeacherConfig(BaseModel):
    """How much a sliced model learns from the dense one, beside the labels; see :func:`distillation_loss`.

    Attributes:
        labels: weight of the cross-entropy with the labels; 0 is off.
        logits: weight of the divergence of the logits; 0 is off.
        features: weight of the difference of the blocks' outputs; 0 is off.
        temperature: that the logits are divided by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    labels: float = Field(default=1.0, ge=0)
    logits: float = Field(default=2.0, ge=0)
    features: float = Field(default=10.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _teaches(self) -> "TeacherConfig":
        if not self.logits and not self.features:
            raise ValueError("logits and features are both 0, so there is nothing to learn; set one of them")
        return self


def distillation_loss(teacher: nn.Module, student: nn.Module, *, smoothing: float = 0.0, **options: Any) -> Loss:
    """The ``loss`` for :func:`sidt.training.loop.fit` and ``finetune`` that learns from labels and from a teacher.

    It is the sum of the cross-entropy with the labels (or with mixup's soft targets),
    ``logits * T^2 * KL(teacher || student)`` of the softmax at temperature T (Hinton et al. 2015, as in DeiT's soft
    distillation), and ``features`` times the mean over the blocks of half the mean squared error of their outputs
    (each block against its own, as CoFi does after structured pruning: Xia et al. 2022), each channel normalised over
    the tokens of the batch. Half that error is one minus Pearson's correlation. Where the plan prunes the width, the
    student's channels are compared with the teacher's that were kept.

    The default weights were chosen by short runs of a small DeiT on CIFAR-100 with 60 % fewer parameters.

    Args:
        teacher: gives logits, batch x classes, or a tuple of them (several heads count by their mean). It is copied;
            the copy runs in eval mode, without gradients, on the device of the images.
        student: the model that will be trained; its ``sidt_plan`` says what is left of the teacher.
        smoothing: of the labels; mixup's targets come smoothed.
        options: fields of ``TeacherConfig``.

    Returns:
        (model, images, targets) -> scalar. ``model`` is the student or a wrapper of it; it has no hooks but during
        its forward.

    Raises:
        InputError: an option is unknown or out of range, the student is no slice of the teacher or has other classes,
            or (at a call) ``model`` is not the student.
    """
    try:
        config = TeacherConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = f"unknown; the options are {', '.join(TeacherConfig.model_fields)}"
        raise InputError(f"distillation option {name}={first['input']!r}: {reason}" if name else reason) from None
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    if (family := getattr(student, "sidt_family", None)) is not None:  # it was sliced by
        teacher.sidt_family = family
    kept = kept_channels(teacher, student) if config.features else {}
    theirs, mine = classes_of(teacher), classes_of(student)
    if config.logits and theirs is not None and mine is not None:
        _check_classes(theirs, mine)

    def loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        with outputs_of(student, kept) as features:
            heads = [head.float() for head in heads_of(model(images))]
        with torch.no_grad(), outputs_of(teacher.to(images.device), kept) as wanted:
            logits = torch.stack(heads_of(teacher(images))).mean(0).float()
        total = heads[0].new_zeros(())
        if config.labels:
            soft = 0.0 if targets.ndim > 1 else smoothing
            each = [functional.cross_entropy(head, targets, label_smoothing=soft) for head in heads]
            total = config.labels * torch.stack(each).mean()
        if config.logits:
            _check_classes(logits.shape[-1], heads[0].shape[-1])
            total = total + config.logits * divergence(torch.stack(heads).mean(0), logits, config.temperature)
        if kept:
            apart = [_apart(block, features.get(block), wanted[block], units) for block, units in kept.items()]
            total = total + config.features * torch.stack(apart).mean()
        return total

    settings = ", ".join(f"{name}={value}" for name, value in [*config, ("smoothing", smoothing)])
    # A resumed run must have the same.
    loss.__qualname__ = f"distillation_loss({settings}) from teacher {weights_digest(teacher)[:8]}"
    return loss


def _check_classes(theirs: int, mine: int) -> None:
    if theirs != mine:
        raise InputError(
            f"the teacher has {theirs} classes and the student {mine}, so their logits cannot be compared; give a "
            f"teacher of the same classes, or logits=0"
        )


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` of two batch x classes logits at temperature T, mean over the batch."""
    mine, theirs = (functional.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return functional.kl_div(mine, theirs, reduction="batchmean", log_target=True) * temperature**2


def dissimilarity(student: Tensor, teacher: Tensor, over: tuple[int, ...]) -> Tensor:
    """Half the mean squared error of two features of one shape, each with mean 0 and variance 1 along ``over``."""
    mine, theirs = (
        (x - x.mean(over, keepdim=True)) * torch.rsqrt(x.var(over, correction=0, keepdim=True) + _EPS)
        for x in (student.float(), teacher.float())
    )
    return functional.mse_loss(mine, theirs) / 2


def kept_channels(teacher: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """For each block that has inner dimensions, which of the teacher's channels are left in the student's output.

    Raises:
        InputError: the student is no slice of the teacher, or a block has no width of its own.
    """
    space = space_for(teacher)
    before: DimensionPlan | None = getattr(teacher, "sidt_plan", None)
    after: DimensionPlan | None = getattr(student, "sidt_plan", None) or before
    dense = (before or DimensionPlan(space, {})).space
    if after is not None and (after.space.model, after.space.sizes) != (dense.model, dense.sizes):
        raise InputError(
            f"the student was sliced from another {after.space.model} than the teacher, a {dense.model}; give the "
            "model that it was sliced from, or features=0"
        )
    kept = {}
    for block, width in _widths(space).items():
        there = np.arange(space.sizes[width]) if before is None else before.keep[width]
        here = there if after is None else after.keep[width]
        kept[block] = torch.from_numpy(np.flatnonzero(np.isin(there, here)))
    return kept


def _widths(space: DimensionSpace) -> dict[str, str]:
    """The width dimension of each block that has inner dimensions: what its output's last axis is."""
    used: dict[str, set[str]] = {}
    for place in space.places.values():
        used.setdefault(place.block, set()).update(n for axis in place.axes for n in names(axis))
    found = {}
    for block, dimensions in used.items():
        widths = [n for n in dimensions if space.dimensions[n].kind == "width"]
        if len(widths) < len(dimensions):
            if len(widths) != 1:
                raise InputError(
                    f"{block} of this {space.model} has {len(widths)} widths, so its output cannot be compared; "
                    "use features=0"
                )
            found[block] = widths[0]
    return found


@contextmanager
def outputs_of(model: nn.Module, names: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Catch what the named modules of a model give while the context is open; no hook is left afterwards."""
    caught: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        caught[name] = output

    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _apart(block: str, mine: Any, theirs: Any, kept: Tensor) -> Tensor:
    """How far a block's output is from the teacher's: each channel (the last axis) over all else."""
    if mine is None:
        raise InputError(f"{block} of the student was not run: the model that is trained is not the given student")
    if mine.shape != (*theirs.shape[:-1], len(kept)):
        raise InputError(
            f"{block} gives {list(mine.shape)} in the student and {list(theirs.shape)} in the teacher, expected the "
            f"same with {len(kept)} channels last; use features=0"
        )
    theirs = theirs if len(kept) == theirs.shape[-1] else theirs.index_select(-1, kept.to(theirs.device))
    return dissimilarity(mine, theirs, tuple(range(mine.ndim - 1)))
