"""Patterns: which entries of a weight may be other than zero.

A pattern says the nearest mask of a weight, and the bits that tell a mask of its kind from others. A structure
(:mod:`sidt.sparsity.structures`) applies several, and what values the rest may take.
"""

from itertools import combinations
from typing import Annotated, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sidt.errors import InputError
from sidt.sparsity.tiles import STRICT, Tiles

Share = Annotated[float, Field(gt=0, le=1)]


def kept_of(share: float, count: int) -> int:
    """How many groups a share of them is: rounded down, at least one."""
    return max(1, int(share * count + 1e-9))


class Pattern(Protocol):
    """A set of masks.

    ``mask`` gives, bool in the weight's shape, what the nearest weight keeps that has such a mask. ``encode`` gives the
    bits (bool, one axis) that ``decode`` makes a mask of again: one that keeps all that the given one keeps. Bits
    behind them do not matter.
    """

    def check(self, weight: Tensor, name: str) -> None: ...  # noqa: D102
    def mask(self, weight: Tensor) -> Tensor: ...  # noqa: D102
    def encode(self, mask: Tensor) -> Tensor: ...  # noqa: D102
    def decode(self, bits: Tensor, like: Tensor) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True, config=STRICT)
class Largest:
    """The tiles of largest Frobenius norm; an index of one bit a tile.

    Attributes:
        tiles: the groups.
        keep: the share of them that is kept, rounded down; never less than one.
    """

    tiles: Tiles
    keep: Share

    def check(self, weight: Tensor, name: str) -> None:
        """Check that the tiles fit."""
        self.tiles.check(weight, name)

    def mask(self, weight: Tensor) -> Tensor:
        """The mask of the nearest weight."""
        norms = self.tiles.norms(weight.detach())
        count = kept_of(self.keep, norms.numel())
        chosen = torch.zeros_like(norms, dtype=torch.bool).view(-1)
        chosen[norms.view(-1).topk(count).indices] = True
        return self.tiles.spread(chosen.view_as(norms), weight)

    def encode(self, mask: Tensor) -> Tensor:
        """One bit a tile: whether any of it is kept."""
        return self.tiles.split(mask.float()).amax((2, 3, 4)).bool().reshape(-1)

    def decode(self, bits: Tensor, like: Tensor) -> Tensor:
        """The mask of these tiles."""
        rows, columns = self.tiles.size(like)
        down, across = -(-len(like) // rows), -(-like.shape[1] // columns)
        return self.tiles.spread(bits[: down * across].view(down, across), like)


@dataclass(frozen=True, config=STRICT)
class OfEvery:
    """The ``n`` largest of every ``m`` inputs in a row, as 2:4; an index of n positions a group.

    Attributes:
        n: how many are kept.
        m: of how many.
    """

    n: Annotated[int, Field(ge=1)]
    m: Annotated[int, Field(ge=2)]

    def check(self, weight: Tensor, name: str) -> None:
        """Check that the groups fit."""
        if self.n >= self.m:
            raise InputError(f"{self.n}:{self.m} keeps all of {name}; keep fewer than {self.m}, as 2:4 does")
        if weight.ndim < 2 or weight.shape[2:].numel() != 1:
            raise InputError(f"{name} is a convolution, and {self.n}:{self.m} is of matrices; match linear layers")
        if weight.shape[1] % self.m:
            raise InputError(f"{name} has {weight.shape[1]} inputs, which {self.m} does not divide; leave it out")

    def mask(self, weight: Tensor) -> Tensor:
        """The mask of the nearest weight."""
        groups = weight.detach().reshape(-1, self.m)
        chosen = torch.zeros_like(groups, dtype=torch.bool)
        chosen.scatter_(1, groups.abs().topk(self.n).indices, True)
        return chosen.view_as(weight)

    def encode(self, mask: Tensor) -> Tensor:
        """The positions of n entries of every group, all kept ones among them."""
        places = mask.reshape(-1, self.m).int().topk(self.n, sorted=True).indices.sort().values
        return as_bits(places.reshape(-1), self._bits)

    def decode(self, bits: Tensor, like: Tensor) -> Tensor:
        """The mask of these positions."""
        groups = like.numel() // self.m
        places = from_bits(bits[: groups * self.n * self._bits], self._bits).view(groups, self.n)
        chosen = torch.zeros(groups, self.m, dtype=torch.bool, device=like.device)
        return chosen.scatter_(1, places.to(like.device), True).view_as(like)

    @property
    def _bits(self) -> int:
        return max(1, (self.m - 1).bit_length())


@dataclass(frozen=True, config=STRICT)
class Kernels:
    """Of every 3 x 3 kernel 4 entries in one of a few patterns, and of the kernels a share: PatDNN (Niu et al. 2020).

    A pattern is the centre and 3 others, one of 56. Those that are most frequent among the kernels' natural ones (the
    centre and its 3 largest others) are taken; kernels are ranked by the energy of their best pattern. The index has
    the patterns, 9 bits each, one bit a kernel, and the pattern of each kernel that is kept. Projecting again changes
    nothing, unless rounding to values made so many entries zero that it is open which patterns there were.

    Attributes:
        patterns: how many patterns there are.
        keep: the share of kernels that is kept, rounded down; never less than one.
    """

    patterns: Annotated[int, Field(ge=1, le=56)]
    keep: Share = 1.0

    def check(self, weight: Tensor, name: str) -> None:
        """Check that the kernels are 3 x 3."""
        if tuple(weight.shape[2:]) != (3, 3):
            raise InputError(
                f"{name} has shape {list(weight.shape)}, and patterns are of 3 x 3 kernels; for others, prune "
                "connectivity: tiles of 1 x 1"
            )

    def mask(self, weight: Tensor) -> Tensor:
        """The mask of the nearest weight among those with the most frequent patterns."""
        table = self._table(weight.detach())
        energy = weight.detach().square().flatten(2) @ table.to(weight.dtype).T
        best, which = energy.max(-1)
        count = kept_of(self.keep, best.numel())
        chosen = torch.zeros_like(best, dtype=torch.bool).view(-1)
        chosen[best.view(-1).topk(count).indices] = True
        return (table[which] & chosen.view_as(best)[..., None]).view_as(weight)

    def encode(self, mask: Tensor) -> Tensor:
        """How many patterns there are, the patterns, one bit a kernel, and the pattern of each that is kept."""
        flat = mask.flatten(2)
        there = flat.any(-1)
        kernels = flat[there]
        table = _covering(kernels)
        which = (kernels[:, None] <= table[None]).all(-1).int().argmax(-1)
        count = as_bits(torch.tensor([len(table) - 1]), _TABLE).to(mask.device)
        return torch.cat([count, table.reshape(-1), there.reshape(-1), as_bits(which, _width(len(table)))])

    def decode(self, bits: Tensor, like: Tensor) -> Tensor:
        """The mask of these kernels."""
        kernels = like.shape[0] * like.shape[1]
        count, rest = int(from_bits(bits[:_TABLE], _TABLE)) + 1, bits[_TABLE:]
        table, rest = rest[: 9 * count].view(count, 9), rest[9 * count :]
        there = rest[:kernels]
        width = _width(count)
        which = from_bits(rest[kernels:][: int(there.sum()) * width], width)
        mask = torch.zeros(kernels, 9, dtype=torch.bool, device=bits.device)
        mask[there] = table[which]
        return mask.view(like.shape)

    def _table(self, weight: Tensor) -> Tensor:
        """The patterns of a weight, bool [patterns, 9]: those that it has, if they are few enough, else the most
        frequent natural ones."""
        size = weight.flatten(2).reshape(-1, 9).abs()
        every = all_patterns().to(weight.device)
        if ((size[:, _OTHERS] > 0).sum(-1) <= _KEPT_OTHERS).all():
            table = _covering(size[size.any(-1)] > 0)
            if len(table) <= self.patterns:
                return table
        natural = (size @ every.to(weight.dtype).T).argmax(-1)
        counts = torch.bincount(natural[size.any(-1)], minlength=len(every))
        return every[counts.sort(descending=True, stable=True).indices[: self.patterns]]


def _covering(kernels: Tensor) -> Tensor:
    """Patterns, one at least, such that each of some kernels has its entries in one of them: bool [patterns, 9].

    Raises:
        InputError: a kernel has more than 3 entries beside its centre.
    """
    every = all_patterns().to(kernels.device)
    left, table = kernels, list[int]()
    while len(left) or not table:
        covers = (left[:, None] <= every[None]).all(-1)
        if not covers.any(-1).all():
            raise InputError("a kernel has more than 4 entries, or 4 without its centre; project the weight first")
        # Kernels that few patterns cover say which: those of four entries, by one.
        votes = (covers / covers.sum(-1, keepdim=True)).sum(0)
        table.append(int(votes.argmax()))
        left = left[~covers[:, table[-1]]]
    return every[sorted(table)]


def _width(patterns: int) -> int:
    """Bits that tell patterns apart."""
    return max(1, (patterns - 1).bit_length())


_CENTRE, _KEPT_OTHERS = 4, 3
_TABLE = 6  # bits of how many there are
_OTHERS = [i for i in range(9) if i != _CENTRE]


def all_patterns() -> Tensor:
    """The 56 patterns of a 3 x 3 kernel: the centre and 3 of the 8 others; bool [56, 9]."""
    table = torch.zeros(56, 9, dtype=torch.bool)
    for row, others in enumerate(combinations(_OTHERS, _KEPT_OTHERS)):
        table[row, [_CENTRE, *others]] = True
    return table


def as_bits(numbers: Tensor, width: int) -> Tensor:
    """Whole numbers, each as ``width`` bits, lowest first: int [n] -> bool [n * width]."""
    return ((numbers.long()[:, None] >> torch.arange(width, device=numbers.device)) & 1).bool().reshape(-1)


def from_bits(bits: Tensor, width: int) -> Tensor:
    """The whole numbers of some bits: bool [n * width] -> int64 [n]."""
    return (bits.view(-1, width).long() << torch.arange(width, device=bits.device)).sum(-1)
