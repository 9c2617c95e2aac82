"""Convolutions that compute with the kernels that are left alone, and what time that takes beside dense ones."""

import copy
import warnings
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidt.cost.clock import time_in_turn
from sidt.errors import InputError
from sidt.sparsity.reordering import Filters, reorder
from sidt.sparsity.structures import Structure

_AT_ONCE = 512  # positions whose sums stay in a core's cache


class PatternConv(nn.Module):
    """A convolution of the kernels that are left, for inference on a CPU.

    For each entry of the kernel the weights of that entry are a sparse matrix [outputs, inputs], which is multiplied
    with the shifted maps and added: as many multiply-adds as there are weights left. With a stride of one the shifted
    maps are not copied. Filters are put back in their places when the matrices are made, so no map is permuted.
    """

    def __init__(self, conv: nn.Conv2d, filters: Filters) -> None:
        """Take over a convolution.

        Args:
            conv: gives bias, stride, padding and dilation.
            filters: its kernels.

        Raises:
            InputError: it is in groups, or pads with something other than a number of zeros.
        """
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise InputError(
                f"a convolution with groups={conv.groups}, padding={conv.padding!r} of {conv.padding_mode} cannot run "
                "on its packed kernels; leave it dense"
            )
        self.bias, self.stride, self.padding, self.dilation = conv.bias, conv.stride, conv.padding, conv.dilation
        self.kernel_size, self.out_channels = conv.kernel_size, conv.out_channels
        self.taps = _taps(filters)

    def forward(self, maps: Tensor) -> Tensor:
        """[images, inputs, height, width] -> [images, outputs, height, width]."""
        (above, left), (below, beside) = self.padding, self.dilation
        reach = [(k - 1) * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        padded = F.pad(maps, (left, left, above, above + 1))  # a row more: the last shift ends behind the last one
        height, width = padded.shape[2] - 1, padded.shape[3]
        tall, wide = ((e - r - 1) // s + 1 for e, r, s in zip((height, width), reach, self.stride, strict=True))
        kernel = product(*map(range, self.kernel_size))
        shifts = [(row * below, column * beside) for row, column in kernel]
        if self.stride == (1, 1):
            starts = [row * width + column for row, column in shifts]
            found = [self._sums([image[:, s : s + tall * width] for s in starts]) for image in padded.flatten(2)]
            return torch.stack(found).view(len(maps), -1, tall, width)[..., :wide]
        (down, right), spans = self.stride, list[tuple[slice, slice]]()
        for row, column in shifts:
            ends = row + (tall - 1) * down + 1, column + (wide - 1) * right + 1
            spans.append((slice(row, ends[0], down), slice(column, ends[1], right)))
        found = [self._sums([image[:, rows, columns].flatten(1) for rows, columns in spans]) for image in padded]
        return torch.stack(found).view(len(maps), -1, tall, wide)

    def _sums(self, shifted: list[Tensor]) -> Tensor:
        """The sums over all entries of the kernel: one map [inputs, positions] for each -> [outputs, positions]."""
        positions = shifted[0].shape[1]
        sums = shifted[0].new_zeros(self.out_channels, positions)
        for begin in range(0, positions, _AT_ONCE):
            end = min(begin + _AT_ONCE, positions)
            part = shifted[0].new_zeros(self.out_channels, end - begin)
            if self.bias is not None:
                part += self.bias[:, None]
            for weights, maps in zip(self.taps, shifted, strict=True):
                if weights is not None:
                    part = torch.addmm(part, weights, maps[:, begin:end])
            sums[:, begin:end] = part
        return sums


def _taps(filters: Filters) -> list[Tensor | None]:
    """The weights of each entry of the kernel, sparse [outputs, inputs]; None where there are none."""
    entries = filters.patterns.shape[1]
    rows, columns = filters.order.repeat_interleave(filters.counts()), filters.columns()
    found: list[Tensor | None] = []
    for entry in range(entries):
        here = columns % entries == entry
        places = torch.stack([rows[here], columns[here] // entries])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that its sparse layouts are in beta, and unchecked
            weights = torch.sparse_coo_tensor(places, filters.values[here], filters.shape[:2])
            found.append(weights.to_sparse_csr() if here.any() else None)
    return found


def pattern_layers(model: nn.Module, structures: Mapping[str, Structure]) -> dict[str, nn.Conv2d]:
    """The convolutions that can run on packed kernels, by the names of their weights.

    Those of a class that standardises its weight, or pads by itself, cannot.

    Raises:
        InputError: no structure is of a convolution without groups.
    """
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in structures}
    found = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward  # no more than that
        if layer.groups == 1 and not isinstance(layer.padding, str)
    }
    if not found:
        raise InputError("no convolution without groups has a structure, so none can run on it; leave engine out")
    return found


def pattern_convolutions(model: nn.Module, structures: Mapping[str, Structure]) -> dict[str, PatternConv]:
    """The convolutions of a model whose weights have a structure, on their packed kernels, by name.

    Args:
        model: on the CPU; it does not change.
        structures: by the names of weights.

    Raises:
        InputError: no structure is of a convolution without groups.
    """
    found = {}
    for name, conv in pattern_layers(model, structures).items():
        weight = conv.weight.detach()
        filters = reorder(weight, structures[name].stored(weight))
        found[name.rpartition(".")[0]] = PatternConv(conv, filters).eval()
    return found


@torch.no_grad()
def time_convolutions(
    model: nn.Module, structures: Mapping[str, Structure], forward: Callable[[nn.Module], Any]
) -> dict[str, float]:
    """Milliseconds of all convolutions with a structure, dense and on their packed kernels, in turn on the same cores.

    Args:
        model: on the CPU.
        structures: by the names of weights.
        forward: runs the model on what the convolutions are to be timed with.

    Raises:
        InputError: as for :func:`pattern_convolutions`.
    """
    twins, seen = pattern_convolutions(model, structures), list[tuple[str, Tensor]]()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: seen.append((name, given[0])))
        for name in twins
    ]
    try:
        forward(model)
    finally:
        for handle in handles:
            handle.remove()
    dense = {name: copy.deepcopy(model.get_submodule(name)) for name in twins}

    def run(layers: Mapping[str, nn.Module]) -> None:
        for name, maps in seen:
            layers[name](maps)

    with torch.inference_mode():
        return time_in_turn({"dense convolutions": lambda: run(dense), "packed convolutions": lambda: run(twins)})
