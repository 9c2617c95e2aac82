"""Memristor crossbars that hold a model's weights: a count, with what zeros save. A model, no measurement.

Adapted from the memristor framework's (structured pruning and quantization by ADMM). A weight [out, in, *kernel] is a
matrix: inputs x kernel drive the wordlines (rows of cells), outputs are read from the bitlines (columns). A weight of 8
bits is two cells of 4 bits beside each other, and is not split between crossbars. Signed weights take a second crossbar
for the negative ones (``signed: pair``), or a column of offsets that the peripherals have (``signed: offset``).

What is assumed of zeros: an input or output that is zero in the whole matrix has no row or column. Further, either each
column of crossbars, which share their outputs, is given its own list of inputs and has no rows for the others; or each
row of crossbars, which share their inputs, adds to its own list of outputs and has no columns for the others. The
better of the two is counted. Outputs and inputs stay in order. The lists themselves, converters and routing are not
counted. The crossbars of a convolution in groups hold no rows for inputs of other groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sidt.hardware.device import Device, Rows, connections, layers_of


class CrossbarDevice(Device):
    """Crossbars of memristors.

    Attributes:
        rows: wordlines.
        columns: bitlines.
        cell_bits: bits that a cell holds.
        weight_bits: bits of a weight.
        signed: pair, a crossbar for positive weights and one for negative ones; or offset, one for both.
    """

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    cell_bits: int = Field(ge=1)
    weight_bits: int = Field(ge=1)
    signed: Literal["pair", "offset"]

    @model_validator(mode="after")
    def _holds_a_weight(self) -> "CrossbarDevice":
        if not self.outputs:
            cells = ceil(self.weight_bits / self.cell_bits)
            raise ValueError(
                f"a weight of {self.weight_bits} bits is {cells} cells beside each other, but columns is {self.columns}"
            )
        return self

    @property
    def outputs(self) -> int:
        """Outputs that one crossbar holds."""
        return self.columns // ceil(self.weight_bits / self.cell_bits)


@dataclass(frozen=True)
class LayerCrossbars:
    """Crossbars of one layer.

    Attributes:
        name: the weight's.
        crossbars: without the rows and columns of zeros.
        dense_crossbars: of a weight without zeros.
    """

    name: str
    crossbars: int
    dense_crossbars: int


def count_crossbars(model: nn.Module, positions: Mapping[str, Rows], device: CrossbarDevice) -> list[LayerCrossbars]:
    """The crossbars that hold each linear layer and convolution, in the order of the positions.

    Args:
        model: a model with zeros in its weights.
        positions: ``space.trace.positions`` of it.
        device: the crossbars.

    Raises:
        InputError: the positions are of another model.
    """
    table = []
    for layer in layers_of(model, positions):
        kept, dense = (
            crossbars(connections(weight, layer.groups).flatten(1), device)
            for weight in (layer.weight, torch.ones_like(layer.weight))
        )
        table.append(LayerCrossbars(layer.name, kept, dense))
    return table


def crossbars(connected: Tensor, device: CrossbarDevice) -> int:
    """The crossbars of one matrix, by which of its weights are not zero: boolean [outputs, inputs]."""
    connected = connected[connected.any(1)][:, connected.any(0)]
    by_outputs = _packed(connected, device.outputs, device.rows)
    by_inputs = _packed(connected.T, device.rows, device.outputs)
    return min(by_outputs, by_inputs) * (2 if device.signed == "pair" else 1)


def _packed(connected: Tensor, together: int, most: int) -> int:
    """Crossbars when each block of ``together`` lines is connected to its own lines across, ``most`` in a crossbar."""
    blocks = F.pad(connected, (0, 0, 0, -len(connected) % together)).unflatten(0, (-1, together)).any(1)
    return sum(ceil(count / most) for count in blocks.sum(1).tolist())
