"""Values: what the entries of a weight may be, and how they are told apart in bits."""

import math
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sidt.sparsity.tiles import STRICT


class Values(Protocol):
    """The values that entries may take, as codes of some bits and scales.

    ``reach`` is how large an entry may grow and still be trained. ``encode`` gives for a weight and a mask the codes of
    the kept entries, int64 [kept], and the scales; ``decode`` makes a weight of the mask's shape of them, float32.
    Decoding what was encoded gives the nearest weight.
    """

    reach: ClassVar[float]

    @property
    def bits(self) -> int: ...  # noqa: D102
    def encode(self, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def decode(self, codes: Tensor, scales: Tensor, mask: Tensor) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True, config=STRICT)
class Floats:
    """Any value of float32.

    Attributes:
        floats: its bits.
    """

    floats: Literal[32] = 32
    bits: ClassVar[int] = 32
    reach: ClassVar[float] = math.inf

    def encode(self, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The bits of each number; no scale."""
        found = weight.detach().float()[mask].contiguous()
        return found.view(torch.int32).long() & 0xFFFFFFFF, found.new_zeros(0)

    def decode(self, codes: Tensor, scales: Tensor, mask: Tensor) -> Tensor:
        """The numbers."""
        signed = torch.where(codes >= 1 << 31, codes - (1 << 32), codes)
        return _placed(signed.to(torch.int32).view(torch.float32), mask)


@dataclass(frozen=True, config=STRICT)
class Ternary:
    """``-alpha, 0, alpha``: zero up to a threshold, and alpha the mean size of the rest, its least-squares scale.

    After trained ternary weights (Zhu et al. 2017); one scale a weight, in 32 bits.

    Attributes:
        ternary: the threshold, as a share of the largest entry's size.
    """

    ternary: Annotated[float, Field(ge=0, lt=1)]
    bits: ClassVar[int] = 2
    reach: ClassVar[float] = 1.0

    def encode(self, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Codes 0 for zero, 1 for alpha, 2 for -alpha; one scale."""
        kept = weight.detach().double()[mask]
        size = kept.abs()
        large = size > self.ternary * (size.max() if len(size) else 0.0)
        alpha = size[large].mean() if large.any() else size.new_zeros(())
        return torch.where(large, torch.where(kept > 0, 1, 2), 0), alpha.float().reshape(1)

    def decode(self, codes: Tensor, scales: Tensor, mask: Tensor) -> Tensor:
        """The numbers."""
        signs = torch.tensor([0.0, 1.0, -1.0, 0.0], device=codes.device)[codes]
        return _placed(signs * scales, mask)


@dataclass(frozen=True, config=STRICT)
class Levels:
    """Evenly spaced levels around 0: the nearest of ``-L, ..., L`` times a scale, with ``L = 2^(levels - 1) - 1``.

    The scale takes the largest entry to the highest level. It is a bfloat16, so that a level times its scale is exact
    in float32, and encoding a decoded weight changes nothing.

    Attributes:
        levels: bits of a level; 8 are two cells of 4 bits on a crossbar.
        per: what has a scale of its own: every output (row), or the whole weight.
    """

    levels: Annotated[int, Field(ge=2, le=8)]
    per: Literal["row", "weight"] = "row"
    reach: ClassVar[float] = math.inf

    @property
    def bits(self) -> int:
        """Bits of a level."""
        return self.levels

    def encode(self, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Levels from 0 for the lowest; a scale for each row, or one."""
        kept = torch.where(mask, weight.detach().float(), 0.0)
        most = kept.abs().flatten(1).amax(1) if self.per == "row" else kept.abs().max().reshape(1)
        scales = (most / self._top).bfloat16().float()
        steps = kept / self._wide(torch.where(scales > 0, scales, 1.0), kept)
        codes = steps.round().clamp(-self._top, self._top).long() + self._top
        return codes[mask], scales

    def decode(self, codes: Tensor, scales: Tensor, mask: Tensor) -> Tensor:
        """The numbers."""
        return _placed((codes - self._top).float(), mask) * self._wide(scales.float(), mask)

    @property
    def _top(self) -> int:
        return (1 << (self.levels - 1)) - 1

    def _wide(self, scales: Tensor, like: Tensor) -> Tensor:
        return scales.view(-1, *(1 for _ in like.shape[1:]))


def _placed(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the kept entries, in order, in a weight that is 0 elsewhere."""
    weight = torch.zeros(mask.shape, device=mask.device)
    weight[mask] = values
    return weight
