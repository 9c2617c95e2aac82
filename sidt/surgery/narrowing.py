"""Layers behind the norms of a rotated width that lost units, refitted in closed form.

Of what a norm gives, x without scale and shift, the sliced norm gives ``c T x``: the first units (behind a LayerNorm
without their mean), larger, since a norm makes its output as long as it has units. With one factor c for all tokens
this is linear in x, so the least-squares weights follow from the dense model's moments alone.
"""

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.space.axes import axis_size, kept_indices
from sidt.space.plan import DimensionPlan
from sidt.surgery.moments import Moments
from sidt.surgery.rotation import rotatable, takes_mean


def narrowed(model: nn.Module, plan: DimensionPlan, moments: Moments) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What the layers behind norms that lost units read in the sliced model, for :func:`refit`.

    Args:
        model: the aligned model.
        plan: what is kept of it.
        moments: of its layers' inputs.

    Returns:
        For each weight that reads a rotated width that lost units: the columns that are kept; the factor c; and a
        matrix A [kept + 1, inputs + 1] that gives the sliced model's inputs from the dense one's, the constant 1 last.

    Raises:
        InputError: a norm scales its units: the model is not, or no longer, aligned.
    """
    space, sizes = plan.space, plan.sizes
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for width, stream in rotatable(space).items():
        if not space.dimensions[width].ordered or sizes[width] == space.sizes[width]:
            continue
        for norm, readers in stream.norms.items():
            scale = getattr(model.get_submodule(norm), "weight", None)
            if scale is not None and not (scale == 1).all():
                raise InputError(f"{norm} scales its units; align the model again after it was trained")
            axis = space.places[readers[0]].axes[1]
            columns = torch.from_numpy(kept_indices(axis, space.sizes, plan.keep, space.per))
            count, size = len(columns), axis_size(axis, space.sizes)
            take = torch.zeros(count, size, dtype=torch.float64)
            take[torch.arange(count), columns] = 1
            if takes_mean(model.get_submodule(norm), size):
                take -= take.mean(0)
            shift = _shift(model, norm, size)
            for reader in readers:  # they may read other tokens, as the two heads of a distilled model
                length = (take @ given_by(model, norm, moments.read_by(reader)) @ take.T).trace()
                factor = (count / length.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
                matrix = torch.zeros(count + 1, size + 1, dtype=torch.float64)
                matrix[:-1, :-1], matrix[-1, -1] = factor * take, 1
                matrix[:-1, -1] = shift[columns] - factor * take @ shift
                found[reader] = (columns, factor, matrix)
    return found


def given_by(model: nn.Module, norm: str, moment: Tensor) -> Tensor:
    """Second moments of what a norm without a scale gives, its shift left out, from those of what is read."""
    size = len(moment) - 1
    without = torch.eye(size + 1, dtype=torch.float64)[:-1]
    without[:, -1] = -_shift(model, norm, size)
    return without @ moment @ without.T


def _shift(model: nn.Module, norm: str, size: int) -> Tensor:
    shift = getattr(model.get_submodule(norm), "bias", None)
    return torch.zeros(size, dtype=torch.float64) if shift is None else shift.detach().double().cpu()
