"""Cycles of an accelerator that computes a layer tile by tile and skips tiles of zeros: a model, no measurement.

Adapted from the loop of Zhang et al. (Optimizing FPGA-based accelerator design for deep convolutional neural networks,
2015) with the blocks of hardware-aware pruning (Tm outputs x Tn inputs x the whole kernel): Tm x Tn multipliers work
on one kernel entry and one position a cycle. For Tm outputs and t positions on chip, with K kernel entries::

    compute = K t                                  # cycles of a tile
    load    = max(Tm Tn K / weight ports, Tn t S / input ports)
    row     = kept tiles * max(compute, load) + compute,  or the store of the row before, if that takes longer
    store   = Tm t / output ports
    cycles  = sum of all rows + the last store

since loads, computing and stores overlap (double buffers). A skipped tile loads neither its weights nor its inputs; a
row without tiles still stores its biases. Tiles at the edges count whole. S input positions are new for each output
position (the strides' product, at most K); what windows share at the edges of t is not counted again. A convolution in
groups runs the tiles on the diagonal. Products of attention, norms and everything that has no weight are not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sidt.hardware.device import Device, Rows, connections, layers_of


class FpgaDevice(Device):
    """An accelerator with Tm x Tn multipliers.

    Attributes:
        tile_outputs: outputs in parallel, Tm.
        tile_inputs: inputs in parallel, Tn.
        tile_positions: most positions whose inputs and outputs are on chip at once.
        weight_ports: words of weights that are loaded in a cycle.
        input_ports: words of inputs that are loaded in a cycle.
        output_ports: words of outputs that are stored in a cycle.
        clock: Hz.
        bits: of a word.
    """

    tile_outputs: int = Field(ge=1)
    tile_inputs: int = Field(ge=1)
    tile_positions: int = Field(ge=1)
    weight_ports: int = Field(ge=1)
    input_ports: int = Field(ge=1)
    output_ports: int = Field(ge=1)
    clock: float = Field(gt=0, allow_inf_nan=False)
    bits: int = Field(ge=1)


@dataclass(frozen=True)
class LayerCycles:
    """What the model of a device says of one layer and one image.

    Attributes:
        name: the weight's.
        tiles: that are not zero.
        dense_tiles: of a weight without zeros.
        cycles: with tiles of zeros skipped.
        dense_cycles: without.
        megabytes: loaded and stored, with tiles of zeros skipped.
        milliseconds: of the cycles.
    """

    name: str
    tiles: int
    dense_tiles: int
    cycles: int
    dense_cycles: int
    megabytes: float
    milliseconds: float


def count_cycles(model: nn.Module, positions: Mapping[str, Rows], device: FpgaDevice) -> list[LayerCycles]:
    """The modelled cycles of each linear layer and convolution for one image, in the order of the positions.

    Args:
        model: a model with zeros in its weights.
        positions: ``space.trace.positions`` of it.
        device: the accelerator.

    Raises:
        InputError: the positions are of another model.
    """
    table = []
    for layer in layers_of(model, positions):
        tiles = dense_tiles = cycles = dense_cycles = words = 0
        kernel = layer.weight.shape[2:].numel()
        connected = connections(layer.weight, layer.groups).any(2)
        possible = connections(torch.ones_like(layer.weight), layer.groups).any(2)
        for first, last, count in layer.rows:
            kept, whole = (kept_tiles(matrix[first:last], device) for matrix in (connected, possible))
            cost, dense = (tile_cycles(t, kernel, count, device, layer.steps) for t in (kept, whole))
            tiles, dense_tiles = tiles + int(kept.sum()), dense_tiles + int(whole.sum())
            cycles, dense_cycles, words = cycles + cost[0], dense_cycles + dense[0], words + cost[1]
        megabytes, milliseconds = words * device.bits / 8e6, cycles / device.clock * 1e3
        table.append(LayerCycles(layer.name, tiles, dense_tiles, cycles, dense_cycles, megabytes, milliseconds))
    return table


def kept_tiles(connected: Tensor, device: FpgaDevice) -> Tensor:
    """Which tiles hold a connection: boolean [outputs, inputs] -> [rows of tiles, tiles in a row]."""
    outputs, inputs = connected.shape
    padded = F.pad(connected, (0, -inputs % device.tile_inputs, 0, -outputs % device.tile_outputs))
    tiles = padded.unflatten(1, (-1, device.tile_inputs)).unflatten(0, (-1, device.tile_outputs))
    kept: Tensor = tiles.any(3).any(1)
    return kept


def tile_cycles(tiles: Tensor, kernel: int, positions: int, device: FpgaDevice, steps: int = 1) -> tuple[int, int]:
    """Cycles of one layer, and the words that it loads and stores.

    Args:
        tiles: which are kept, boolean [rows of tiles, tiles in a row].
        kernel: entries of a kernel; 1 for a linear layer.
        positions: that it is applied to.
        device: the accelerator.
        steps: input positions that are new for each output position.
    """
    if not positions or not tiles.numel():
        return 0, 0
    rounds = ceil(positions / device.tile_positions)
    on_chip = ceil(positions / rounds)  # rounds are alike
    compute = kernel * on_chip
    weights = device.tile_outputs * device.tile_inputs * kernel
    inputs = device.tile_inputs * on_chip * min(steps, kernel)
    outputs = device.tile_outputs * on_chip
    load = max(ceil(weights / device.weight_ports), ceil(inputs / device.input_ports))
    store = ceil(outputs / device.output_ports)
    cycles = words = 0
    for kept in tiles.sum(1).tolist():
        cycles += max(kept * max(compute, load) + (compute if kept else 0), store)
        words += kept * (weights + inputs) + outputs
    return rounds * cycles + store, rounds * words
