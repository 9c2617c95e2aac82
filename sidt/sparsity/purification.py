"""Network Purification: units that are almost empty and matter little are made empty. It is lossy.

Adapted from the memristor framework's. Unused Path Removal (:mod:`sidt.sparsity.unused`) takes them out afterwards, and
that is exact.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.importance.scores import Importance, Scores, unit_sums
from sidt.space.axes import names, views
from sidt.space.families import INNER_KINDS
from sidt.space.space import DimensionSpace

Model = TypeVar("Model", bound=nn.Module)


def purify(model: Model, space: DimensionSpace, scores: Scores, eta: float, sigma: float) -> Model:
    """A copy in which units that are emptier than ``eta`` and matter less than ``sigma`` are zero in every place.

    **This changes the outputs**: what is left in those units goes. How much that costs is for the caller to measure.
    Heads, q/k, v and hidden units are looked at; not the width, nor units that statistics are taken over.

    Args:
        model: a model with zeros in its weights.
        space: its space.
        scores: importance of each unit (``Importance.scores``).
        eta: share of zero entries, from 0 to 1, over all weights (of two axes or more) that the unit lives in.
        sigma: importance, in the unit of the scores.

    Raises:
        InputError: ``eta`` is no share, ``sigma`` no number, or the scores are for another model.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}; give the share of zero entries above which a unit may go, from 0 to 1")
    if math.isnan(sigma):
        raise InputError("sigma is not a number; give the importance below which a unit may go")
    given, empty = Importance(space, scores).scores, emptiness(model, space)
    pure = copy.deepcopy(model)
    tensors = {**dict(pure.named_parameters()), **dict(pure.named_buffers())}
    for name, dimension in space.dimensions.items():
        if dimension.kind not in INNER_KINDS or dimension.fixed or dimension.normed or not empty[name].numel():
            continue
        goes = (empty[name] > eta) & torch.from_numpy(given[name] < sigma)
        for place in space.places:
            _clear(tensors[place].detach(), space, place, name, goes)
    return pure


def emptiness(model: nn.Module, space: DimensionSpace) -> dict[str, Tensor]:
    """The share of zero entries of every unit over all weights (of two axes or more) that it lives in.

    Returns:
        For each dimension float64, shape [size] or [parents, size].
    """
    weights = {n: model.get_parameter(n).detach() for n, p in space.places.items() if not p.is_buffer}
    weights = {n: weight for n, weight in weights.items() if weight.ndim > 1}
    zeros = unit_sums(space, ((n, weight == 0) for n, weight in weights.items()))
    entries = unit_sums(space, ((n, torch.ones_like(weight)) for n, weight in weights.items()))
    return {name: zeros[name] / entries[name].clamp(min=1) for name in zeros}


def _clear(tensor: Tensor, space: DimensionSpace, place: str, name: str, goes: Tensor) -> None:
    """Set some units of a dimension to zero in one tensor, in place."""
    for dim, axis in enumerate(space.places[place].axes):
        if name not in names(axis):
            continue
        gone = torch.zeros(tensor.shape[dim], dtype=torch.bool)
        for at, view, kept in views(axis, space.sizes, name, space.per):
            shape = [size if position in kept else 1 for position, size in enumerate(view)]
            gone[list(at)] = goes.view(shape).expand(view).reshape(-1)
        tensor.movedim(dim, 0)[gone.to(tensor.device)] = 0
