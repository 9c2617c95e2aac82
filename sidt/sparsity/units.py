"""Units as groups: what a unit of a dimension space has in every place where it lives, as one group.

They are the lines of TPrune on a vision transformer: coupled, so that a zero one can leave through a plan.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sidt.importance.scores import unit_sums
from sidt.space.axes import axis_size, views
from sidt.space.families import INNER_KINDS, Kind
from sidt.space.space import DimensionSpace
from sidt.sparsity.tiles import root


def unit_norms(model: nn.Module, space: DimensionSpace, kinds: Iterable[Kind] = INNER_KINDS) -> dict[str, Tensor]:
    """The norm of every unit, over all weights where it lives; float64 on the CPU, differentiable.

    Args:
        model: the model.
        space: its space.
        kinds: of the dimensions.

    Returns:
        For each dimension that may shrink, [size], or [parent size, size].
    """
    weights = ((name, p.square()) for name, p in model.named_parameters() if name in space.places)
    wanted, sums = set(kinds), unit_sums(space, weights)
    return {n: root(s) for n, s in sums.items() if space.dimensions[n].kind in wanted and not space.dimensions[n].fixed}


@torch.no_grad()
def zero_units(model: nn.Module, space: DimensionSpace, dropped: Mapping[str, Tensor]) -> None:
    """Make units zero in every place where they live, in place.

    Args:
        model: the model.
        space: its space.
        dropped: for some dimensions which units, bool in the shape of :func:`unit_norms`.
    """
    tensors = dict(model.named_parameters())
    for name, units in dropped.items():
        for parameter, place in space.places.items():
            for dim, axis in enumerate(() if place.is_buffer else place.axes):
                gone = torch.zeros(axis_size(axis, space.sizes), dtype=torch.bool)
                for at, shape, kept in views(axis, space.sizes, name, space.per):
                    here = units.view([extent if d in kept else 1 for d, extent in enumerate(shape)])
                    gone[list(at)] |= here.expand(shape).reshape(-1)
                if gone.any():
                    tensor = tensors[parameter]
                    tensor[(slice(None),) * dim + (gone.to(tensor.device),)] = 0.0
