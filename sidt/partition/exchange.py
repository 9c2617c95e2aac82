"""Making a sublayer's output whole on every device: messages between processes (``torch.distributed``)."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from sidt.partition.grid import Grid


def exchange(grid: Grid, out: Tensor) -> None:
    """Fill in the rest of a sublayer's output, in the two rounds of :mod:`sidt.partition.grid`.

    Args:
        grid: of the sublayer; the ranks are its devices.
        out: [rows, ...], contiguous; what this device computed of its strip's rows. It is filled in.
    """
    me = dist.get_rank()
    strip = [i for i in grid.strip(me) if i != me]
    own = out[slice(*grid.owned[me])]
    partial = {i: torch.empty_like(own) for i in strip}
    _messages({i: out[slice(*grid.owned[i])] for i in strip}, partial)
    for i in strip:
        own += partial[i]
    others = [i for i in range(dist.get_world_size()) if i != me]
    _messages({i: own for i in others}, {i: out[slice(*grid.owned[i])] for i in others})


def _messages(sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
    """Send tensors to some ranks and receive some, all at once; empty ones are not sent."""
    going = [dist.isend(tensor, rank) for rank, tensor in sent.items() if tensor.numel()]
    going += [dist.irecv(tensor, rank) for rank, tensor in received.items() if tensor.numel()]
    for message in going:
        if message is not None:
            message.wait()
