"""Structures: which entries of a weight may be zero together, and which values the others may take.

A structure is a projection, ``weight -> nearest feasible weight``, and a number of bits. It does not know how a model
gets there (:mod:`sidt.sparsity.admm`, :mod:`sidt.sparsity.penalties`), and no way of getting there knows a structure.
"""

from typing import Annotated, Any

import torch
from pydantic import Discriminator, Tag
from pydantic.dataclasses import dataclass
from torch import Tensor

from sidt.sparsity.patterns import Kernels, Largest, OfEvery, Pattern
from sidt.sparsity.reordering import order_bits
from sidt.sparsity.tiles import STRICT
from sidt.sparsity.values import Floats, Levels, Ternary


def _by_key(**kinds: str) -> Discriminator:
    """Which of several kinds a mapping is, by a key that only this kind has."""

    def kind(value: Any) -> str:
        if not isinstance(value, dict):
            return type(value).__name__
        return next((name for key, name in kinds.items() if key in value), next(iter(kinds.values())))

    return Discriminator(kind)


AnyPattern = Annotated[
    Annotated[Largest, Tag("Largest")] | Annotated[OfEvery, Tag("OfEvery")] | Annotated[Kernels, Tag("Kernels")],
    _by_key(tiles="Largest", patterns="Kernels", n="OfEvery"),
]
AnyValues = Annotated[
    Annotated[Ternary, Tag("Ternary")] | Annotated[Levels, Tag("Levels")] | Annotated[Floats, Tag("Floats")],
    _by_key(ternary="Ternary", levels="Levels", floats="Floats"),
]


@dataclass(frozen=True, config=STRICT)
class Bits:
    """What a weight takes: bits of its values, of the index that says where they are, and of scales."""

    values: int
    index: int
    scales: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.values + self.index + self.scales


@dataclass(frozen=True, config=STRICT)
class Structure:
    """Patterns, each applied to what the one before left, and the values of what is left.

    Attributes:
        patterns: which entries may be other than zero.
        values: what those may be.
    """

    patterns: tuple[AnyPattern, ...] = ()
    values: AnyValues = Floats()

    def check(self, weight: Tensor, name: str) -> None:
        """Check that the structure is one for a weight.

        Raises:
            InputError: it is not; the message names the weight.
        """
        for pattern in self.patterns:
            pattern.check(weight, name)

    def mask(self, weight: Tensor) -> Tensor:
        """What the nearest weight keeps: bool in the weight's shape."""
        kept = torch.ones_like(weight, dtype=torch.bool)
        for pattern in self.patterns:
            kept = kept & pattern.mask(torch.where(kept, weight.detach(), 0.0))
        return kept

    def project(self, weight: Tensor) -> Tensor:
        """The nearest feasible weight: for several patterns one after the other, then the values."""
        return self.rounded(weight, self.mask(weight))

    def rounded(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The nearest weight of a mask."""
        if isinstance(self.values, Floats):
            return torch.where(mask, weight.detach(), 0.0)
        return self.values.decode(*self.values.encode(weight, mask), mask).to(weight.dtype)

    def masks(self, weight: Tensor) -> list[tuple[Pattern, Tensor, Tensor]]:
        """Each pattern with its index of a feasible weight, and the mask that the index stands for."""
        found: list[tuple[Pattern, Tensor, Tensor]] = []
        for pattern in self.patterns:
            index = pattern.encode(weight != 0)
            found.append((pattern, index, pattern.decode(index, weight)))
        return found

    def stored(self, weight: Tensor) -> Tensor:
        """Which entries of a feasible weight have values in its packed form; all others are zero."""
        kept = torch.ones_like(weight, dtype=torch.bool)
        for _, _, mask in self.masks(weight):
            kept = kept & mask
        return kept

    @property
    def reorders(self) -> bool:
        """Whether the packed form has the filters in the order of their work: of kernels with patterns (PatDNN)."""
        alone = [isinstance(p, Kernels) or (isinstance(p, Largest) and p.tiles.rows == 1) for p in self.patterns]
        return all(alone) and any(isinstance(p, Kernels) for p in self.patterns)

    def bits(self, weight: Tensor) -> Bits:
        """What a feasible weight takes, packed."""
        kept = self.stored(weight)
        scales = {Ternary: 32, Levels: 16}.get(type(self.values), 0) * len(self.values.encode(weight, kept)[1])
        index = sum(bits.numel() for _, bits, _ in self.masks(weight))
        index += len(weight) * order_bits(len(weight)) if self.reorders else 0
        return Bits(int(kept.sum()) * self.values.bits, index, scales)
