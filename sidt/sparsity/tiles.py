"""Groups of entries: a weight as a grid of tiles.

Every group that the companions of SiDT prune is a tile of some size: a line is as long as the matrix, the lanes of a
processing element are one row high, a convolution's kernel is one entry of the grid.
"""

from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sidt.errors import InputError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Tiles:
    """A weight [out, in, *kernel] as a grid of tiles of ``rows`` outputs x ``columns`` inputs x the whole kernel.

    ==========================  ===================================================
    ``Tiles(1, None)``          lines: one output each
    ``Tiles(None, 1)``          lines: one input each
    ``Tiles(1, p)``             the lanes of a processing element
    ``Tiles(m, n)``             tiles of an accelerator's loops
    ``Tiles(1, 1)``             the kernels of a convolution
    ``Tiles(128, 1, True)``     the wordlines of crossbars with 128 bitlines
    ==========================  ===================================================

    Attributes:
        rows: outputs in a tile; None: all.
        columns: inputs in a tile; None: all.
        ragged: whether the last tiles may be cut off by the end of the weight.
    """

    rows: _Size | None
    columns: _Size | None
    ragged: bool = False

    def __str__(self) -> str:
        """The size, for tables and messages."""
        return " x ".join("all" if size is None else str(size) for size in (self.rows, self.columns))

    def size(self, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of a tile of a weight."""
        return self.rows or len(weight), self.columns or weight.shape[1]

    def check(self, weight: Tensor, name: str) -> None:
        """Check that the tiles fit a weight.

        Raises:
            InputError: the weight is no matrix or convolution, or tiles do not divide it and are not ragged.
        """
        if weight.ndim < 2:
            raise InputError(f"{name} has {weight.ndim} axis, and tiles need outputs and inputs; match weights alone")
        for what, extent, size in zip(("outputs", "inputs"), weight.shape, self.size(weight), strict=False):
            if extent % size and not self.ragged:
                near = [d for d in range(1, extent + 1) if extent % d == 0]
                fits = sorted(near, key=lambda d: abs(d - size))[:3]
                raise InputError(
                    f"{name} has {extent} {what}, which tiles of {self} do not divide; take one of "
                    f"{', '.join(map(str, sorted(fits)))} {what}, or set ragged: true"
                )

    def split(self, weight: Tensor) -> Tensor:
        """The tiles of a weight: [grid rows, grid columns, rows, columns, kernel]; what is cut off is 0."""
        rows, columns = self.size(weight)
        flat = weight.reshape(*weight.shape[:2], -1)
        below, right = -len(weight) % rows, -weight.shape[1] % columns
        if below or right:
            flat = torch.nn.functional.pad(flat, (0, 0, 0, right, 0, below))
        grid = flat.reshape(flat.shape[0] // rows, rows, flat.shape[1] // columns, columns, flat.shape[2])
        return grid.transpose(1, 2)

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """A value for each tile, at every entry of it: [grid rows, grid columns] -> the weight's shape."""
        rows, columns = self.size(weight)
        wide = values.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        return wide.reshape(*weight.shape[:2], *(1 for _ in weight.shape[2:])).expand_as(weight)

    def norms(self, weight: Tensor) -> Tensor:
        """The Frobenius norm of each tile, [grid rows, grid columns]; its gradient at 0 is 0."""
        return root(self.split(weight).square().sum((2, 3, 4)))


def root(squares: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is taken as 0."""
    there = squares > 0
    return torch.where(there, squares, 1.0).sqrt() * there
