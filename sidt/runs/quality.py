"""How good the models of a run are: by labels where there are any, else by how much they are like the dense one."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from sidt.report.text import quality
from sidt.runs.folder import Run, dense_model
from sidt.runs.images import data_of
from sidt.space.outputs import classes_of
from sidt.training.evaluation import answers, correct, distances, evaluated, judged, log_likelihood

PARTS = 8  # of the held-out images; after each a hopeless trial can be stopped


def gives_features(model: nn.Module) -> bool:
    """Whether the outputs of a timm model are features; else they are logits."""
    return classes_of(model) == 0


def is_blind(run: Run, dense: nn.Module) -> bool:
    """Whether the models of a run are judged by the dense one's outputs, since there are no labels for theirs."""
    return gives_features(dense) or not data_of(run.config.data).classes


class _Taught(Dataset[tuple[Tensor, Tensor]]):
    """Images with the outputs of a model as their targets."""

    def __init__(self, images: Dataset[Any], outputs: Tensor) -> None:
        self.images, self.outputs = images, outputs

    def __len__(self) -> int:
        return len(self.outputs)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        rows = Subset(self.images, indices).__getitems__(list(range(len(indices))))
        return [(image, self.outputs[i]) for (image, _), i in zip(rows, indices, strict=True)]


def _unlabelled(images: Dataset[Any]) -> Dataset[Any]:
    return _Taught(images, torch.zeros(len(images)))  # type: ignore[arg-type]


def objective_of(run: Run, images: Dataset[Any]) -> Callable[[nn.Module], Iterator[Any]]:
    """What models are judged by on some images, part by part: one number for each image, higher is better."""
    options: dict[str, Any] = {"device": run.device}
    dense = dense_model(run)
    parts = [range(i, len(images), PARTS) for i in range(min(PARTS, len(images)))]  # type: ignore[arg-type]
    if is_blind(run, dense):
        features = gives_features(dense)
        taught = _Taught(images, evaluated(dense, _unlabelled(images), **options))

        def like(model: nn.Module, part: Dataset[Any]) -> np.ndarray:
            return judged(model, part, lambda out, wanted: -distances(out, wanted, features=features), **options)

        return lambda model: (like(model, Subset(taught, part)) for part in parts)
    judge = correct if run.config.search.objective == "top1" else log_likelihood
    return lambda model: (judge(model, Subset(images, part), **options) for part in parts)


def judged_by(run: Run, dense: nn.Module) -> str:
    """What models are judged by, in words."""
    if not is_blind(run, dense):
        return {"top1": "top-1", "loss": "log-likelihood"}[run.config.search.objective]
    return f"minus the {'relative error of the features' if gives_features(dense) else 'divergence of the answers'}"


def says_of(run: Run, model: nn.Module, images: Dataset[Any]) -> str:
    """How good a model of a run is on some images, in words."""
    what, part = quality(evaluate_on(run, dense_model(run), model, images)[0])
    return f"{part:.2%} {what}"


def evaluate_on(
    run: Run, dense: nn.Module, model: nn.Module, images: Dataset[Any]
) -> tuple[dict[str, float], np.ndarray | None]:
    """The quality of a model on some images, and the classes that it answers; ``None`` for features.

    Without labels it is the part of them on which its first choice is the dense model's; for features, the part whose
    nearest neighbour among the others, by the cosine, is the same one, beside the mean squared error relative to their
    length.
    """
    options = {"device": run.device}
    if gives_features(dense):
        wanted, seen = (evaluated(m, _unlabelled(images), **options).flatten(1) for m in (dense, model))
        same = (neighbours(wanted) == neighbours(seen)).numpy()
        error = float(distances(seen, wanted, features=True).mean())
        return _with_error("neighbours", same) | {"relative_error": error}, None
    given = answers(model, images, **options)
    if is_blind(run, dense):
        return _with_error("agreement", given == answers(dense, images, **options)), given
    return _with_error("top1", given == labels_of(images)), given


def labels_of(images: Any) -> np.ndarray:
    """The labels of some images of a data set."""
    return labels_of(images.dataset)[images.indices] if isinstance(images, Subset) else images.labels


def _with_error(key: str, right: np.ndarray) -> dict[str, float]:
    return {key: float(right.mean()), "error": float(right.std() / np.sqrt(len(right))), "images": len(right)}


def neighbours(features: Tensor) -> Tensor:
    """Of each row the nearest other row, by the cosine."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    found = []
    for start in range(0, len(unit), 1024):
        near = unit[start : start + 1024] @ unit.T
        rows = torch.arange(len(near))
        near[rows, start + rows] = -torch.inf
        found.append(near.argmax(1))
    return torch.cat(found)
