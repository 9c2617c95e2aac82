"""Penalties on the norms of groups: what training adds to the loss so that whole groups become zero.

They know norms alone: of tiles of one weight, or of the units of a space.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def group_lasso(norms: Iterable[Tensor]) -> Tensor:
    """``sum |W_g|``: a scalar (Yuan and Lin 2006; by block and line it is TPrune's BSSL).

    Args:
        norms: for each weight or dimension, the norms of its groups, of any shape.
    """
    return _sum(n.sum() for n in norms)


def hoyer_square(norms: Iterable[Tensor]) -> Tensor:
    """``sum over weights of (sum |W_g|)^2 / |W|^2``: TPrune's Structured Hoyer Square
    (after DeepHoyer, Yang et al. 2020).

    It does not change when a weight is scaled, and lies between 1 (one group is left) and the number of groups. A
    weight that is zero has none, and no gradient.
    """
    return _sum(_hoyer(n) for n in norms)


def clipped(norms: Iterable[Tensor], eta: float) -> Tensor:
    """``sum min(|W_g|, delta)`` with ``delta = eta * mean |W_g|`` of the weight: Weight Penalty Clipping.

    What is larger than the threshold, which adapts itself and has no gradient, is left alone.
    """
    return _sum(torch.minimum(n, eta * n.detach().mean()).sum() for n in norms)


def _hoyer(norms: Tensor) -> Tensor:
    squares = norms.square().sum()
    there = squares > 0
    return norms.sum().square() / torch.where(there, squares, 1.0)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
