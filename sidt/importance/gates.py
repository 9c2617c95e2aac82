"""Gates: the search stage of SiDT.

Every unit gets a learnable factor, one at the start, that is trained together with the weights under
``task loss + sum over kinds of lambda * sum |gate|``. A gate multiplies weights, not activations: its cost is
O(parameters) whatever the batch and the image, and no forward is touched. Where it multiplies follows from the space,
so any backbone or detector with a space has gates.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn
from torch.utils.data import Dataset

from sidt.errors import InputError
from sidt.importance.placements import Gate, Placement, Site, placed
from sidt.importance.scores import Importance, unit_sums
from sidt.space.axes import axis_size
from sidt.space.families import INNER_KINDS, Kind
from sidt.space.space import DimensionSpace, space_for
from sidt.surgery.reading import Reading
from sidt.training.loop import Loss, TrainConfig, fit, label_loss

_GATES = "sidt_gates"  # the model's submodule that holds the parameters


class _Factor:
    """What multiplies one tensor: the product of its gates."""

    def __init__(self, parameters: nn.ParameterDict, speed: float) -> None:
        self.parameters, self.speed = parameters, speed
        self.sites: list[tuple[Gate, Site]] = []

    def along(self, extents: Sequence[int]) -> dict[int, Tensor]:
        """The factors along each axis that has some."""
        found: dict[int, Tensor] = {}
        for gate, site in self.sites:
            value = _value(self.parameters[_key(gate.name)], self.speed).view(gate.shape)
            shape = [s if d in site.kept else 1 for d, s in enumerate(site.view)]
            along = (value**site.power if site.power > 1 else value).view(shape).expand(site.view).reshape(-1)
            if len(along) < extents[site.dim]:
                along = along.new_ones(extents[site.dim]).index_copy(
                    0, torch.tensor(site.at, device=along.device), along
                )
            found[site.dim] = found[site.dim] * along if site.dim in found else along
        return found

    def __call__(self, tensor: Tensor) -> Tensor:
        for dim, along in self.along(tensor.shape).items():
            tensor = tensor * along.to(tensor.dtype).view([-1 if d == dim else 1 for d in range(tensor.ndim)])
        return tensor


def _value(parameter: Tensor, speed: float) -> Tensor:
    return parameter if speed == 1 else 1 + speed * (parameter - 1)


class Gates:
    """The gates of a model; made by :func:`gated`.

    Attributes:
        model: the model that has them, as a submodule ``sidt_gates``.
        space: its space.
        speed: how far a gate moves when its tensor does: a gate is ``1 + speed * (tensor - 1)``.
    """

    def __init__(self, model: nn.Module, space: DimensionSpace, found: list[Gate], speed: float) -> None:
        """Register the gates; :meth:`attach` puts them to work."""
        self.model, self.space, self.speed = model, space, speed
        self._found = {gate.name: gate for gate in found}
        device = next(model.parameters()).device
        ones = {n: torch.ones(math.prod(g.shape), device=device) for n, g in self._found.items()}
        self._parameters = nn.ParameterDict({_key(n): nn.Parameter(tensor) for n, tensor in ones.items()})
        self._factors: dict[str, _Factor] = {}
        for gate in found:
            for site in gate.sites:
                factor = self._factors.setdefault(site.parameter, _Factor(self._parameters, speed))
                factor.sites.append((gate, site))
        self._reading: Reading | None = None
        setattr(model, _GATES, self._parameters)

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        """The learnable tensors, by the names of the gates.

        They are one-dimensional, so that optimisers that spare biases give them no weight decay. Gates are named after
        dimensions; after the heads where q, k and v share them; after the weight for ``vtp``.
        """
        return {name: self._parameters[_key(name)] for name in self._found}

    def values(self) -> dict[str, Tensor]:
        """The gates themselves, each in the shape of its units; differentiable."""
        return {n: _value(p, self.speed).view(self._found[n].shape) for n, p in self.gates.items()}

    def attach(self) -> None:
        """Let every gated tensor read as the product with its gates."""
        self._reading = Reading(self.model, self._factors)

    def penalty(self, lambdas: float | Mapping[Kind, float]) -> Tensor:
        """``sum over kinds of lambda * sum |gate|``, a scalar; a kind that ``lambdas`` lacks has none."""
        terms = []
        for name, value in self.values().items():
            weight = lambdas.get(self._found[name].kind, 0.0) if isinstance(lambdas, Mapping) else lambdas
            terms.append(weight * value.abs().sum())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def scores(self) -> Importance:
        """The sizes of the factors on the gated rows and columns, summed over all that a unit has.

        So a head scores as much as all its units together, as it costs as much. Units without a gate (kinds that were
        left out, dimensions that must stay whole) score 1.
        """
        sums, gated = unit_sums(self.space, ()), unit_sums(self.space, ())
        for parameter, factor in self._factors.items():
            shape = [axis_size(axis, self.space.sizes) for axis in self.space.places[parameter].axes]
            for dim, along in factor.along(shape).items() if len(shape) > 1 else ():
                there = torch.zeros(shape[dim])
                for site in (site for _, site in factor.sites if site.dim == dim):
                    there[list(site.at)] = shape[dim] / math.prod(shape)  # all other axes are summed over, too
                for totals, each in ((sums, along.abs().cpu() * there), (gated, there)):
                    entries = each.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
                    for name, total in unit_sums(self.space, [(parameter, entries)], dim).items():
                        totals[name] += total
        return Importance(self.space, {n: torch.where(gated[n] > 0, s, 1.0).numpy() for n, s in sums.items()})

    @torch.no_grad()
    def remove(self, *, fold: bool) -> None:
        """Take the gates out of the model, classes and all.

        Args:
            fold: whether the weights are multiplied by them, so that the outputs stay; else they stay what they are.
        """
        if self._reading is not None:
            self._reading.remove(keep=fold)
        delattr(self.model, _GATES)


def _key(name: str) -> str:
    return name.replace(".", "-")  # a dot would be a submodule


def gated(
    model: nn.Module,
    space: DimensionSpace | None = None,
    *,
    placement: Placement = "sidt",
    kinds: Iterable[Kind] = INNER_KINDS,
    speed: float = 1.0,
    attach: bool = True,
) -> Gates:
    """Give a model gates of one, in place. The names in its state dict stay, and ``sidt_gates.*`` come in addition.

    ============  =====================================================================================
    ``sidt``      one gate for each unit of each dimension, on the columns of the weights that read it; q/k units,
                  which no weight reads, on the rows that write q
    ``vtp``       one for each input of each weight of a block (Zhu et al. 2021); q and k have none
    ``vit-slim``  one for each unit of a head, shared by its q, k and v: q x gate^2, v x gate; MLP units as ``sidt``
                  (Chavan et al. 2022)
    ============  =====================================================================================

    Args:
        model: a backbone or a detector.
        space: its space, if it is at hand; for a detector it must be given.
        placement: where the gates stand.
        kinds: the kinds of dimensions that get gates; dimensions that must stay whole get none.
        speed: see :class:`Gates`.
        attach: whether they act at once; else :meth:`Gates.attach` makes them, say, once weights are initialised.

    Raises:
        InputError: the placement is unknown or does not fit, the model has gates, or nothing can be gated.
    """
    if hasattr(model, _GATES):
        raise InputError(f"this {type(model).__name__} has gates already; remove them first")
    space = space or space_for(model)
    gates = Gates(model, space, placed(space, placement, kinds), speed)
    if attach:
        gates.attach()
    return gates


# --- the search stage ----------------------------------------------------------------------------------------------


class GateConfig(TrainConfig):
    """How gates are learned; the rest is as in :class:`sidt.training.loop.TrainConfig`.

    What counts is how far gates can move: the sum over the updates of ``lr * speed``. The defaults let one that only
    the penalty moves go from 1 to 0 in some 200 updates, here 2 epochs of 4,096 images, so that a tenth of the MLP
    units end at 0; with more images or epochs, lower the speed. What came of other values is in
    benchmarks/results/gates.md.

    Attributes:
        lambdas: the penalty's weight, for all kinds or by kind; for a loss of another size, change it likewise.
        speed: how many times as fast as weights gates move, under Adam and its kind.
        placement: see :func:`gated`.
        kinds: the kinds of dimensions that get gates.
    """

    epochs: int = Field(default=2, ge=0)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    warmup_epochs: float = Field(default=0.1, ge=0)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    lambdas: NonNegativeFloat | dict[Kind, NonNegativeFloat] = 1e-3
    speed: float = Field(default=100.0, gt=0)
    placement: Placement = "sidt"
    kinds: tuple[Kind, ...] = INNER_KINDS


@dataclass(frozen=True, eq=False)
class LearnedGates:
    """What the search stage found.

    Attributes:
        importance: the scores.
        gates: the values of the gates; see :meth:`Gates.values`.
        model: the model as trained with its gates, folded: an ordinary model of the same size.
        history: of the training; see :func:`sidt.training.loop.fit`.
    """

    importance: Importance
    gates: dict[str, npt.NDArray[np.float32]]
    model: nn.Module
    history: list[dict[str, float]]


def learn_gates(
    model: nn.Module,
    train: Dataset[Any],
    config: GateConfig | None = None,
    *,
    loss: Loss | None = None,
    space: DimensionSpace | None = None,
    folder: Path | None = None,
) -> LearnedGates:
    """Train a copy of a model together with its gates, on the task loss and the penalty. The given one stays as it is.

    Slice the given model by these scores, unless the search stage is a long one. The trained and folded model is what
    SiDT slices; it loses next to nothing by slicing, but a short stage has not made good yet what the penalty cost it:
    on a CIFAR-100 ViT of 64.3 %, 40 % fewer parameters left 51 % of the folded model and 59 % of the given one, both
    without fine-tuning (benchmarks/results/gates.md).

    There the scores are as good as Taylor's for 40 % fewer parameters, and better for 60 % (+1.7 +- 0.7 points of
    top-1), for nine times Taylor's time. Without the penalty they rank nothing.

    Args:
        model: a trained model.
        train: samples of image and label.
        config: how to train; default: ``GateConfig()``.
        loss: (model, images, targets) -> scalar, in place of the cross-entropy.
        space: the model's space, if it is at hand.
        folder: of the resumable state; it must be this run's own.

    Raises:
        InputError: as for :func:`gated` and :func:`sidt.training.loop.fit`.
    """
    config = config or GateConfig()
    trained = copy.deepcopy(model)
    gates = gated(trained, space, placement=config.placement, kinds=config.kinds, speed=config.speed)
    own = loss or label_loss(0.0 if config.mixup or config.cutmix else config.smoothing)

    def penalised(wrapped: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return own(wrapped, images, targets) + gates.penalty(config.lambdas)

    own_name = getattr(loss, "__qualname__", type(loss).__name__) if loss else "cross entropy"
    # A resumed training must have the same loss; its config, with the lambdas, is compared as well.
    penalised.__qualname__ = f"{own_name} with gates"
    history = fit(trained, train, config, loss=penalised, folder=folder, label="gates")
    importance = gates.scores()
    values = {name: value.detach().cpu().numpy() for name, value in gates.values().items()}
    gates.remove(fold=True)
    return LearnedGates(importance, values, trained, history)
