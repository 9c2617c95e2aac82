"""TPrune's two trainings (Mao et al. 2021) on the space's units: which lines prune well, and units trained to zero."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from sidt.importance.scores import Importance
from sidt.space.families import INNER_KINDS, Kind
from sidt.space.space import DimensionSpace, space_for
from sidt.sparsity.penalties import group_lasso, hoyer_square
from sidt.sparsity.tiles import Tiles
from sidt.sparsity.units import unit_norms
from sidt.training.loop import Loss, TrainConfig, fit, label_loss

ROWS, COLUMNS = Tiles(1, None), Tiles(None, 1)


class NormConfig(TrainConfig):
    """How units are trained to zero; the rest is as in :class:`sidt.training.loop.TrainConfig`.

    Attributes:
        strength: the penalty's weight.
        kinds: the kinds of dimensions whose units it is of.
    """

    epochs: int = Field(default=2, ge=0)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    warmup_epochs: float = Field(default=0.1, ge=0)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    strength: float = Field(default=1e-3, gt=0)
    kinds: tuple[Kind, ...] = INNER_KINDS


@dataclass(frozen=True, eq=False)
class LearnedNorms:
    """What training under Structured Hoyer Square found.

    Attributes:
        importance: the norm of every unit; 1 for those that are not of the kinds asked for.
        model: the trained model.
        history: of the training; see :func:`sidt.training.loop.fit`.
    """

    importance: Importance
    model: nn.Module
    history: list[dict[str, float]]


def learn_norms(
    model: nn.Module,
    train: Dataset[Any],
    config: NormConfig | None = None,
    *,
    loss: Loss | None = None,
    space: DimensionSpace | None = None,
    folder: Path | None = None,
) -> LearnedNorms:
    """Train a copy of a model under TPrune's Structured Hoyer Square on its units, and score them by what is left.

    Args:
        model: a trained model; it stays as it is.
        train: samples of image and label.
        config: how to train; default: ``NormConfig()``.
        loss: (model, images, targets) -> scalar, in place of the cross-entropy.
        space: the model's space, if it is at hand.
        folder: of the resumable state; it must be this run's own.

    Raises:
        InputError: as for :func:`sidt.training.loop.fit`.
    """
    config, space = config or NormConfig(), space or space_for(model)
    trained = copy.deepcopy(model)
    own = loss or label_loss(0.0 if config.mixup or config.cutmix else config.smoothing)

    def penalised(wrapped: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        sparse = hoyer_square(unit_norms(trained, space, config.kinds).values())
        return own(wrapped, images, targets) + config.strength * sparse.to(images.device)

    penalised.__qualname__ = f"{getattr(loss, '__qualname__', 'cross entropy')} with Hoyer squares of units"
    history = fit(trained, train, config, loss=penalised, folder=folder, label="norms")
    with torch.no_grad():
        norms = unit_norms(trained, space, config.kinds)
    sizes = space.sizes
    shapes = {n: (*([sizes[d.per]] if d.per else []), d.size) for n, d in space.dimensions.items()}
    scores = {n: norms[n] if n in norms else torch.ones(shape) for n, shape in shapes.items()}
    return LearnedNorms(Importance(space, {n: s.double().numpy() for n, s in scores.items()}), trained, history)


def line_lasso(model: nn.Module, names: list[str]) -> Tensor:
    """TPrune's Block-wise Structured Sparsity Learning: ``sum over weights and both orientations of sum |W_line|``.

    Args:
        model: the model.
        names: of its weights, the blocks.
    """
    weights = [model.get_parameter(name) for name in names]
    return group_lasso(tiles.norms(w) for w in weights for tiles in (ROWS, COLUMNS))


@torch.no_grad()
def small_lines(model: nn.Module, names: list[str], share: float) -> dict[str, tuple[float, float]]:
    """Which matrices, and which orientations of them, prune well: the share of lines that are next to nothing.

    Args:
        model: a model, trained under :func:`line_lasso`.
        names: of its weights.
        share: a line counts whose norm is below this share of its weight's largest line of that orientation.

    Returns:
        For each weight the share of its rows (outputs), and of its columns (inputs).
    """
    found = {}
    for name in names:
        norms = [tiles.norms(model.get_parameter(name)).reshape(-1) for tiles in (ROWS, COLUMNS)]
        rows, columns = (float((n < share * n.max()).float().mean()) for n in norms)
        found[name] = rows, columns
    return found
