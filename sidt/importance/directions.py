"""The units of a rotated width, scored as what they are: directions in order, and behind a LayerNorm the mean."""

import torch
from torch import Tensor, nn

from sidt.space.space import DimensionSpace
from sidt.surgery.rotation import changed, norm_size, rotatable, takes_mean


def is_centred(model: nn.Module, space: DimensionSpace, width: str) -> bool:
    """Whether the units of a rotated width stand behind a LayerNorm; behind an RMSNorm they are the directions."""
    stream = rotatable(space)[width]
    norm = next(iter(stream.norms))
    return takes_mean(model.get_submodule(norm), norm_size(space, stream, norm))


def directions(units: Tensor) -> Tensor:
    """The mean and the directions of units behind a LayerNorm, along the last axis but one.

    It is the product with the orthogonal matrix of a constant row and Helmert's rows
    (:func:`sidt.surgery.rotation.helmert_rows`), which sums alone make: row k is
    ``(x_0 + ... + x_k-1 - k x_k) / sqrt(k (k + 1))``.
    """
    found, size = units.cumsum(-2).roll(1, -2), units.shape[-2]  # the sum of all comes first
    count = torch.arange(size, dtype=units.dtype, device=units.device)[:, None]
    length = (count * (count + 1)).sqrt()
    length[0] = size**0.5
    return found.addcmul_(count, units, value=-1).div_(length)


def along(tensor: Tensor, name: str, space: DimensionSpace, width: str) -> Tensor:
    """A tensor that reads or writes a centred width, in the coordinates of its directions."""
    for dim in rotatable(space)[width].places[name]:
        tensor = changed(tensor, dim, space.places[name].axes[dim], width, space.sizes, directions)
    return tensor
