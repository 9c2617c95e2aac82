"""In a worker: the time of what a partitioned forward is made of, taken while all workers do the same.

Workers share this machine's cores, so each piece is timed as it will run: all start a sublayer together, and nobody
goes on before all have ended it. By the wall's clock, since a core that another worker has is time that passes.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidt.partition.exchange import exchange
from sidt.partition.grid import Cell, Grid
from sidt.partition.workload import Sublayer

_REPEATS = 8  # of exchanges in a round


@dataclass(frozen=True)
class Pieces:
    """Seconds of one round in one worker.

    Attributes:
        layers: of each sublayer, whole, and last of the rest of the model.
        small: of an exchange of next to nothing.
        large: of an exchange of the largest output.
    """

    layers: tuple[float, ...]
    small: float
    large: float


def time_pieces(model: nn.Module, owners: Sequence[str], images: Tensor, stream: int) -> Pieces:
    """Time the pieces once.

    Args:
        model: the whole model.
        owners: its sublayers.
        images: a batch.
        stream: bytes of the largest output.
    """
    small, large = probes(dist.get_world_size(), stream)
    return Pieces(tuple(_layers(model, owners, images)), _exchange_seconds(small), _exchange_seconds(large))


def probes(count: int, stream: int) -> tuple[Grid, Grid]:
    """What is exchanged to see how fast the link is: next to nothing and as many bytes, by so many devices."""
    small, large = (Sublayer("", "", "mlp", rows, 1, count, 1.0, 0.0, 4, 0, 4) for rows in (count, stream // 4))
    strip = [Grid(each, tuple(Cell((0, each.rows), (i, i + 1)) for i in range(count))) for each in (small, large)]
    return strip[0], strip[1]


def _layers(model: nn.Module, owners: Sequence[str], images: Tensor) -> list[float]:
    """Seconds of each sublayer and of the rest, with a meeting of all workers after each sublayer."""
    own = dict.fromkeys(owners, 0.0)
    rest, mark = 0.0, 0.0

    def enters(*_: Any) -> None:
        nonlocal rest, mark
        now = time.perf_counter()
        rest, mark = rest + now - mark, now

    def leaves(owner: str) -> None:
        nonlocal mark
        own[owner] += time.perf_counter() - mark
        dist.barrier()
        mark = time.perf_counter()

    with ExitStack() as stack:
        for owner in owners:
            module = model.get_submodule(owner)
            stack.callback(module.register_forward_pre_hook(enters).remove)
            stack.callback(module.register_forward_hook(lambda *_, owner=owner: leaves(owner)).remove)
        dist.barrier()
        mark = time.perf_counter()
        model(images)
        rest += time.perf_counter() - mark
    return [*own.values(), rest]


def _exchange_seconds(grid: Grid) -> float:
    """Mean seconds of an exchange, of some in a row: who comes late from a meeting counts once in all of them."""
    out = torch.zeros(grid.sublayer.rows, 1)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        exchange(grid, out)
    return (time.perf_counter() - begin) / _REPEATS
