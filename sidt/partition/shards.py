"""The shards of a partition: a model in which each sublayer has only the units of one device, and how it runs.

A shard is the model sliced by a plan that keeps the device's heads and hidden units; a sublayer that it has no unit of
has no parameters. The output bias of a sublayer is added once: by the first device of each strip, and is zero in the
others. A forward of a shard is the whole model's, in which each sublayer computes its cell and is given the rest by
the others (``join``).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.partition.grid import Cell, Grid
from sidt.partition.planner import Partition
from sidt.partition.workload import tokenwise
from sidt.space import axes
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace
from sidt.surgery.slicing import slice_model

Join = Callable[[Grid, Tensor], None]  # given [rows, ...] with what this process computed, fills in the rest


def shard_of(model: nn.Module, space: DimensionSpace, partition: Partition, index: int) -> nn.Module:
    """The model with the units of one device only; the given model is not changed.

    Args:
        model: the model that was cut, in eval mode.
        space: its own space.
        partition: of it.
        index: of the device in the partition.
    """
    own = [(grid, grid.cells[index]) for grid in partition.grids]
    keep = {
        grid.sublayer.dimension: np.arange(*cell.units)
        for grid, cell in own
        if not cell.empty and grid.sublayer.units > 1  # else it is in one piece
    }
    shard = slice_model(model, DimensionPlan(space, keep))
    del shard.sidt_plan  # it is a part, and no model of its own that could be saved
    for grid, cell in own:
        if cell.empty:
            shard.set_submodule(grid.sublayer.owner, nn.Module())
        elif grid.strip(index)[0] != index:
            bias = _output_bias(shard, space, grid)
            if bias is not None:
                nn.init.zeros_(bias)
    return shard


def _output_bias(model: nn.Module, space: DimensionSpace, grid: Grid) -> nn.Parameter | None:
    """The bias of the layer that sums over a sublayer's units: its weight has them along a later axis than rows."""
    name = grid.sublayer.dimension
    for place, found in space.places.items():
        inside = place.startswith(f"{grid.sublayer.owner}.") and place.endswith(".weight") and len(found.axes) > 1
        if inside and name not in axes.names(found.axes[0]) and any(name in axes.names(a) for a in found.axes[1:]):
            bias = getattr(model.get_submodule(place.rpartition(".")[0]), "bias", None)
            if isinstance(bias, nn.Parameter):
                return bias
    return None


class CutSublayer(nn.Module):
    """A sublayer of which this process computes some cells."""

    def __init__(self, parts: Sequence[tuple[Cell, nn.Module]], grid: Grid, join: Join, *, tokenwise: bool) -> None:
        """Hold the modules of the cells.

        Args:
            parts: cells that are not empty, and the modules that compute them.
            grid: the whole sublayer.
            join: makes the output whole.
            tokenwise: whether rows are all tokens, and not the first axis of the input.
        """
        super().__init__()
        self.cells = [cell for cell, _ in parts]
        self.parts = nn.ModuleList(module for _, module in parts)
        self.grid, self.join, self.tokenwise = grid, join, tokenwise

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sublayer's output, of the shape of ``x``, which is [..., C].

        Raises:
            InputError: the batch is not of as many images as the partition was made for.
        """
        rows = x.flatten(0, -2) if self.tokenwise else x
        if len(rows) != self.grid.sublayer.rows:
            raise InputError(
                f"the partition was made for {self.grid.sublayer.rows} rows in {self.grid.sublayer.owner} and is given "
                f"{len(rows)}; give a batch of as many images as it was made for"
            )
        out: Tensor | None = None
        for cell, module in zip(self.cells, self.parts, strict=True):
            first, last = cell.rows
            beside = [_rows_of(a, first, last, len(rows)) for a in args]
            named = {key: _rows_of(a, first, last, len(rows)) for key, a in kwargs.items()}
            own = module(rows[first:last], *beside, **named)
            if len(self.cells) == 1 and len(own) == len(rows):
                out = own.contiguous()  # nothing to add to, and no copy
            else:
                out = torch.zeros(rows.shape, dtype=own.dtype, device=own.device) if out is None else out
                out[first:last] += own
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if out is None else out
        self.join(self.grid, out)
        return out.view(x.shape)


def _rows_of(value: Any, first: int, last: int, rows: int) -> Any:
    """Of a tensor that repeats along the rows, as the masks of windows do from image to image, those of a range."""
    if not isinstance(value, Tensor) or not value.ndim or not len(value) or rows % len(value):
        return value
    return value[torch.arange(first, last, device=value.device) % len(value)]


def joined(shard: nn.Module, space: DimensionSpace, partition: Partition, index: int, join: Join) -> nn.Module:
    """A shard whose sublayers compute their cells and are completed by ``join``; the shard is changed."""
    return _cut(shard, space, partition, {index: shard}, join)


def assembled(model: nn.Module, space: DimensionSpace, partition: Partition) -> nn.Module:
    """All shards in one process, which add up: what the devices compute together, without them.

    Raises:
        InputError: at a forward, if the batch has other images than the partition was made for.
    """
    shards = {index: shard_of(model, space, partition, index) for index in range(len(partition.devices))}
    return _cut(copy.deepcopy(model), space, partition, shards, lambda grid, out: None)


def _cut(
    model: nn.Module, space: DimensionSpace, partition: Partition, shards: Mapping[int, nn.Module], join: Join
) -> nn.Module:
    for grid in partition.grids:
        owner = grid.sublayer.owner
        parts = [(grid.cells[i], shard.get_submodule(owner)) for i, shard in shards.items() if not grid.cells[i].empty]
        model.set_submodule(owner, CutSublayer(parts, grid, join, tokenwise=tokenwise(space, owner)))
    return model


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two outputs, as a part of the largest expected value where that is above 1."""
    return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))
