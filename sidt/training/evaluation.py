"""Top-1 accuracy, and the checks that come before a model meets data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sidt.errors import InputError
from sidt.space.outputs import classes_of, heads_of
from sidt.training.batches import make_loader
from sidt.training.devices import resolve_device


def check_classes(model: nn.Module, n_classes: int) -> None:
    """Check that a model is made for a data set's number of classes; models that do not say it pass.

    Raises:
        InputError: it is made for another number.
    """
    own = classes_of(model)
    if own and own != n_classes:  # without a head there are none
        raise InputError(
            f"the model has {own} classes and the data has {n_classes}; "
            f"use data with {own} classes or a model with num_classes={n_classes}"
        )


def check_data(model: nn.Module, data: Dataset[Any]) -> int:
    """Check the classes of a data set, if it tells them, and return its number of samples.

    Raises:
        InputError: it is a loader of batches, or has no samples or no number of them, or another number of classes.
    """
    if isinstance(data, DataLoader):
        raise InputError("the data is a DataLoader, which gives batches; give its data set: loader.dataset")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InputError(
            f"the data is a {type(data).__name__} without a length and places; give a data set with len(data) and "
            f"data[i], an image and its label"
        )
    count = len(data)
    if not count:
        raise InputError("the data set is empty (0 samples); give one with images")
    classes = getattr(data, "classes", None)
    if classes:  # none: there are no labels
        check_classes(model, len(classes))
    return count


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for a block; every module's own mode comes back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


Judge = Callable[[Tensor, Tensor], Tensor]  # logits, targets -> one value for every sample


def correct(model: nn.Module, data: Dataset[Any], **options: Any) -> np.ndarray:
    """Whether the model's first choice is right: bool, one for every sample, in order.

    The options are those of :func:`judged`, and so is what is raised.
    """
    return judged(model, data, lambda logits, targets: logits.argmax(-1) == targets, **options)


def answers(model: nn.Module, data: Dataset[Any], **options: Any) -> np.ndarray:
    """The class that the model gives first: int64, one for every sample, in order.

    The options are those of :func:`judged`, and so is what is raised.
    """
    return judged(model, data, lambda logits, _: logits.argmax(-1), **options)


def log_likelihood(model: nn.Module, data: Dataset[Any], **options: Any) -> np.ndarray:
    """Log-probability that the model gives to the right class: one for every sample, in order.

    Less noisy than accuracy where close models are compared. The options are those of :func:`judged`.
    """
    return judged(model, data, lambda logits, targets: -F.cross_entropy(logits, targets, reduction="none"), **options)


@torch.no_grad()  # not inference_mode: what a model caches in it could not be trained with afterwards
def judged(
    model: nn.Module,
    data: Dataset[Any],
    judge: Judge,
    *,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
) -> np.ndarray:
    """One value for every sample, in order.

    The model is moved to ``device`` and stays there; its modules' training modes are restored.

    Raises:
        InputError: the data set is empty or of another number of classes, or there is no such device.
    """
    check_data(model, data)
    place = resolve_device(device)
    with evaluating(model.to(place)):
        values = [
            judge(torch.stack(heads_of(model(images.to(place)))).mean(0).float().cpu(), targets)
            for images, targets in make_loader(data, batch_size, workers=workers)
        ]
    return torch.cat(values).numpy()


def evaluated(model: nn.Module, data: Dataset[Any], **options: Any) -> Tensor:
    """What a model gives for every sample, in order: float32, samples x its output, on the CPU.

    The options are those of :func:`judged`, and so is what is raised.
    """
    return torch.from_numpy(judged(model, data, lambda outputs, _: outputs, **options))


def top1(model: nn.Module, data: Dataset[Any], **options: Any) -> float:
    """Top-1 accuracy, a fraction. The options are those of ``correct``."""
    return float(correct(model, data, **options).mean())


def distances(outputs: Tensor, wanted: Tensor, *, features: bool) -> Tensor:
    """How far the outputs for each sample are from the wanted ones: float, one for every sample.

    Args:
        outputs: samples x anything.
        wanted: of the same shape.
        features: the squared error relative to the wanted length; else KL(wanted || outputs) of logits.
    """
    if features:
        mine, theirs = outputs.float().flatten(1), wanted.float().flatten(1)
        return (mine - theirs).square().sum(1) / theirs.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    mine, theirs = (x.float().log_softmax(-1) for x in (outputs, wanted))
    return F.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1)
