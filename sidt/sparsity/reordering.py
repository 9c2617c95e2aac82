"""Filter reordering: the kernels of a convolution that are left, filters that do the same work side by side."""

from dataclasses import dataclass

import torch
from torch import Tensor


def filter_order(kept: Tensor) -> Tensor:
    """The order of PatDNN (Niu et al. 2020): filters with most kernels first; of equal ones, those of like patterns
    beside each other.

    So filters that run at the same time take the same time, and take the same turns in it.

    Args:
        kept: which entries have values, bool [outputs, inputs, *kernel].

    Returns:
        The filter at each place, int64 [outputs].
    """
    kernels = kept.flatten(2) if kept.ndim > 2 else kept[..., None]
    kinds, which = kernels.reshape(-1, kernels.shape[2]).unique(dim=0, return_inverse=True)
    there, which = kinds.any(1), which.view(kernels.shape[:2])
    counts = torch.stack([(which == kind).sum(1) for kind in range(len(kinds)) if there[kind]] or [which[:, 0] * 0], 1)
    keys = torch.cat([counts.sum(1, keepdim=True), counts], 1).tolist()
    return torch.tensor(sorted(range(len(keys)), key=lambda i: [-count for count in keys[i]]), dtype=torch.int64)


def order_bits(filters: int) -> int:
    """How many bits the number of a filter takes."""
    return max(1, (filters - 1).bit_length())


@dataclass(frozen=True)
class Filters:
    """The kernels of a convolution that are left, filter after filter, each filter's by pattern.

    Attributes:
        order: the filter at each place, int64 [outputs].
        starts: the first kernel of each place, and how many there are in all, int64 [outputs + 1].
        inputs: the input of each kernel, int64 [kernels].
        which: the pattern of each kernel, int64 [kernels].
        patterns: entries that kernels have, bool [patterns, entries of a kernel].
        values: of all kernels, one after the other, [values].
        shape: of the weight.
    """

    order: Tensor
    starts: Tensor
    inputs: Tensor
    which: Tensor
    patterns: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def columns(self) -> Tensor:
        """Where each value stands in its row of the weight as a matrix [outputs, inputs * entries], int64 [values]."""
        entries = self.patterns.shape[1]
        kernel, entry = self.patterns[self.which].nonzero(as_tuple=True)
        return self.inputs[kernel] * entries + entry

    def counts(self) -> Tensor:
        """How many values each place has, int64 [outputs]."""
        sizes = torch.cat([self.which.new_zeros(1), self.patterns.sum(1)[self.which].cumsum(0)])
        return sizes[self.starts].diff()

    def restored(self) -> Tensor:
        """The weight that :func:`reorder` was given, bit for bit."""
        rows = self.order.repeat_interleave(self.counts())
        weight = self.values.new_zeros(self.shape[0], self.shape[1] * self.patterns.shape[1])
        weight[rows, self.columns()] = self.values
        return weight.view(self.shape)


def reorder(weight: Tensor, kept: Tensor) -> Filters:
    """The kernels of a weight, in the order of :func:`filter_order`.

    Args:
        weight: of a convolution, [outputs, inputs, *kernel]; what is not kept is 0.
        kept: which entries have values (:meth:`sidt.sparsity.Structure.stored`), bool in its shape.
    """
    order = filter_order(kept)
    flat, masks = weight.detach()[order].flatten(2), kept[order].flatten(2)
    patterns, which = masks.reshape(-1, masks.shape[2]).unique(dim=0, return_inverse=True)
    which = which.view(masks.shape[:2])
    turns = which.sort(dim=1, stable=True)  # the inputs of each filter, by pattern
    there = patterns.any(1)[turns.values]
    inputs, which = turns.indices[there], turns.values[there]
    starts = torch.cat([inputs.new_zeros(1), there.sum(1).cumsum(0)])
    places = torch.arange(len(order), device=inputs.device).repeat_interleave(starts.diff())
    values = flat[places, inputs][patterns[which]]
    return Filters(order.to(inputs.device), starts, inputs, which, patterns, values, tuple(weight.shape))
