"""Norms inside a sublayer, over units of which some are gone.

A norm over heads, v or hidden units takes its statistics over all of them. A unit that is zero counts in them, so the
sliced norm counts as many zeros as units are gone, and the sliced sublayer computes what the masked one does. (The
width is no such case: its norms look at the units that are left.)
"""

import torch.nn.functional as F
from timm.layers.norm import LayerNorm as TimmLayerNorm
from torch import Tensor, nn

from sidt.errors import InputError


class SlicedLayerNorm(nn.LayerNorm):
    """Layer normalisation whose statistics count the units that are gone as zeros.

    Only a module's class is changed: no parameter is added, and names stay.

    Attributes:
        dense_size: units of the dense norm.
    """

    dense_size: int

    def forward(self, x: Tensor) -> Tensor:
        """[..., units] -> the same."""
        size = x.shape[-1]
        x = F.layer_norm(F.pad(x, [0, self.dense_size - size]), [self.dense_size], None, None, self.eps)[..., :size]
        return x * self.weight + self.bias


NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: SlicedLayerNorm,
    TimmLayerNorm: SlicedLayerNorm,
}


def count_what_is_gone(module: nn.Module, dense_size: int, name: str) -> None:
    """Give a norm, whose weight is sliced, the class that counts the units that are gone.

    Args:
        module: the norm.
        dense_size: how many units it had.
        name: of its weight.

    Raises:
        InputError: there is no such class for it.
    """
    if isinstance(module, SlicedLayerNorm) or not module.get_parameter("weight").numel():
        return  # it counts those of the dense model, or went with the last head
    known = NORMS.get(type(module))
    if known is None or module.bias is None:
        kind = f"{type(module).__qualname__} without bias" if known is not None else type(module).__qualname__
        raise InputError(
            f"{name} is of a norm, {kind}, over units that the plan drops, and only LayerNorm with a bias can count "
            f"them; write ! behind its axes in the search space, so that they stay"
        )
    module.__class__ = known
    module.dense_size = dense_size  # type: ignore[assignment]
