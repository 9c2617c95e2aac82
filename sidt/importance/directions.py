"""The units of a rotated width, scored as what they are: directions in order, and behind a LayerNorm the mean."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sidt.space.space import DimensionSpace
from sidt.surgery.rotation import helmert_rows, norm_size, rotatable, takes_mean, turned


def directions_of(model: nn.Module, space: DimensionSpace, width: str) -> Tensor | None:
    """The orthogonal matrix [C, C] from the units of a rotated width to its mean and its directions.

    ``None`` behind an RMSNorm, where the units are the directions.
    """
    stream, size = rotatable(space)[width], space.sizes[width]
    norm = next(iter(stream.norms))
    if not takes_mean(model.get_submodule(norm), norm_size(space, stream, norm)):
        return None
    mean = torch.full((1, size), size**-0.5, dtype=torch.float64)
    return torch.cat([mean, helmert_rows(size).T])


def along(
    tensors: Mapping[str, Tensor], space: DimensionSpace, width: str, directions: Tensor | None
) -> dict[str, Tensor]:
    """The tensors that read or write a rotated width, in the coordinates of its directions."""
    found = {}
    for name, at in rotatable(space)[width].places.items():
        if name in tensors:
            tensor = tensors[name].detach()
            for dim in at:
                axis = space.places[name].axes[dim]
                tensor = tensor if directions is None else turned(tensor, dim, axis, width, space.sizes, directions)
            found[name] = tensor
    return found
