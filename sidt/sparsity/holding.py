"""Training under a structure: the mask stays, and values are trained through their rounding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.sparsity.structures import Structure
from sidt.sparsity.values import Floats
from sidt.surgery.reading import Reading


class _StraightThrough(torch.autograd.Function):
    """A rounded weight whose gradient goes to the weight that was rounded, where that may move."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor, moves: Tensor) -> Tensor:
        ctx.save_for_backward(moves)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (moves,) = ctx.saved_tensors
        return gradient * moves, None, None


class _Held:
    """What one weight reads as."""

    def __init__(self, structure: Structure, mask: Tensor) -> None:
        self.structure, self.mask = structure, mask

    def __call__(self, weight: Tensor) -> Tensor:
        mask = self.mask = self.mask.to(weight.device)
        if isinstance(self.structure.values, Floats):
            return torch.where(mask, weight, 0.0)
        moves = mask & (weight.detach().abs() < self.structure.values.reach)
        read: Tensor = _StraightThrough.apply(weight, self.structure.rounded(weight, mask), moves)
        return read


def hold(model: nn.Module, structures: Mapping[str, Structure], masks: Mapping[str, Tensor] | None = None) -> Reading:
    """Let weights of a model read as the nearest of their structures, with the masks that they have now.

    The parameters stay as they are, float32 and dense, and are what is trained: the gradient goes straight through the
    rounding (Bengio et al. 2013); it is zero where the mask is, and for ternary weights where ``|w| >= 1``. Masks do
    not change. ``hold(...).remove(keep=True)`` makes the parameters what they read as.

    Args:
        model: changed in place.
        structures: by the names of weights.
        masks: of these weights; default: the structures' own.

    Raises:
        InputError: a weight is not there, or the structure is not for it.
    """
    weights = weights_of(model, structures)
    masks = masks or {name: structure.mask(weights[name]) for name, structure in structures.items()}
    return Reading(model, {name: _Held(structure, masks[name]) for name, structure in structures.items()})


def weights_of(model: nn.Module, structures: Mapping[str, Structure]) -> dict[str, nn.Parameter]:
    """The weights of a model that structures are for.

    Raises:
        InputError: one is not there, or its structure is not for it.
    """
    there, found = dict(model.named_parameters()), {}
    for name, structure in structures.items():
        if name not in there:
            raise InputError(f"a structure is for {name}, which this {type(model).__name__} does not have")
        structure.check(there[name], name)
        found[name] = there[name]
    return found


@torch.no_grad()
def project(model: nn.Module, structures: Mapping[str, Structure]) -> None:
    """Make weights of a model the nearest of their structures, in place.

    Raises:
        InputError: as for :func:`hold`.
    """
    for name, weight in weights_of(model, structures).items():
        weight.copy_(structures[name].project(weight))
