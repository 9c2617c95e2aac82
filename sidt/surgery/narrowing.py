"""Layers behind the norms of a rotated width that lost units, refitted in closed form.

Of what a norm gives, x without scale and shift, the sliced norm gives ``c T x``: the first units (behind a LayerNorm
without their mean), larger, since a norm makes its output as long as it has units. With one factor c for all tokens
this is linear in x, so the least-squares weights follow from the dense model's moments alone.
"""

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.space.axes import kept_indices
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
            moment = moments.read_by(readers[0])
            given, count = given_by(model, norm, moment), len(columns)
            take = torch.zeros(count, len(given), dtype=torch.float64)
            take[torch.arange(count), columns] = 1
            if takes_mean(model.get_submodule(norm), len(given)):
                take -= take.mean(0)
            factor = (count / (take @ given @ take.T).trace().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
            matrix = torch.zeros(count + 1, len(given) + 1, dtype=torch.float64)
            matrix[:-1, :-1], matrix[-1, -1] = factor * take, 1
            shift = _shift(model, norm, len(given))
            matrix[:-1, -1] = shift[columns] - factor * take @ shift
            found |= dict.fromkeys(readers, (columns, factor, matrix))
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
