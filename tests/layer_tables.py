"""Layer latencies without a clock."""

from functools import cache

import numpy as np
from backbones import PVT, SWIN, VIT_TINY, dense
from torch import nn

from sidt import importance
from sidt.allocation.timing import timed_layers
from sidt.cost.latency import LayerLatencies, LayerTable, grid_of
from sidt.surgery.rotation import rotatable

FAMILIES = (VIT_TINY, SWIN, PVT)
WHERE = {"machine": "abacus", "device": "cpu", "threads": 1, "batch": 1}


def rotated_space(backbone):
    """The space of an aligned model; the clock does not care for its weights."""
    space = dense(backbone)[1]
    return space.ordered(rotatable(space))


@cache
def by_hand(backbone, seed=0, rotated=False) -> LayerLatencies:
    """Tables without a clock: time grows with the sizes, unevenly, and every layer has a table of its own."""
    model, space = dense(backbone)
    space = rotated_space(backbone) if rotated else space
    rng = np.random.default_rng(seed)
    tables = []
    for name, (_, dims) in timed_layers(model, space, nn.Module.__call__).items():
        grid = tuple(grid_of(space.dimensions[d]) for d in dims)
        times = rng.uniform(0.05, 0.2, [len(sizes) for sizes in grid])
        for axis in range(times.ndim):
            times = times.cumsum(axis=axis)
        tables.append(LayerTable({name: dims}, grid, times.tolist()))
    dense_ms = 1.5 * sum(np.max(t.milliseconds) for t in tables)
    return LayerLatencies(space, WHERE, dense_ms, tuple(tables))


def random_scores(backbone, seed=0, rotated=False):
    model, space = dense(backbone)
    return importance.random(model, seed=seed, space=rotated_space(backbone) if rotated else space)
