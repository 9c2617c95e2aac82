"""Latency of plans, from a table of what the layers take at some of their sizes.

Time is no polynomial of sizes: kernels have steps, and attention does work that multiply-adds do not show. So the
layers that dimensions live in are timed at a grid of sizes (:func:`sidt.measure_layers`), and time is linear
between them. What is left of the dense model's time does not follow the plan.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sidt.cost.complexity import PlanCosts
from sidt.errors import InputError
from sidt.files import read_json, write_json
from sidt.space.axes import Array
from sidt.space.space import VANISHING, Dimension, DimensionSpace

Float = npt.NDArray[np.float64]

STEP = 8  # the sizes between two multiples of it take a kernel as long as the larger one
_FORMAT = "sidt-latency-2"
_SLOPE = 0.01  # the least part of a layer's time that goes with its sizes: noise must leave no flat step


@dataclass(frozen=True)
class LayerTable:
    """What one kind of layer takes.

    Attributes:
        layers: the modules of this kind, each with its dimensions in the order of the grid's axes.
        grid: for each axis the sizes that were timed, ascending; the last is the dense one.
        milliseconds: nested lists, one level for each axis.
    """

    layers: Mapping[str, tuple[str, ...]]
    grid: tuple[tuple[int, ...], ...]
    milliseconds: Any

    def smooth(self) -> Float:
        """The times, made to grow with every size; times that do so already keep their steps."""
        seen = np.asarray(self.milliseconds, dtype=np.float64)
        over, under, share = seen, seen, np.zeros_like(seen)
        for axis, sizes in enumerate(self.grid):
            over = np.maximum.accumulate(over, axis=axis)
            under = np.flip(np.minimum.accumulate(np.flip(under, axis), axis=axis), axis)
            shape = [-1 if i == axis else 1 for i in range(seen.ndim)]
            share = share + (np.array(sizes) / max(sizes[-1], 1)).reshape(shape) / seen.ndim
        # At the dense sizes the layer takes what was measured, so that the dense model does.
        grown = np.minimum((over + under) / 2, seen.flat[-1])
        times: Float = (1 - _SLOPE) * grown + _SLOPE * seen.flat[-1] * share
        return times

    def whole(self, space: DimensionSpace) -> npt.NDArray[np.int64]:
        """Nanoseconds at every size from none to the dense one, along every axis; of all but heads, every eighth."""
        times = self.smooth()
        for axis, name in enumerate(next(iter(self.layers.values()))):
            dimension = space.dimensions[name]
            step = dimension.step(STEP)
            sizes = np.minimum(np.arange(-(-dimension.size // step) + 1) * step, dimension.size)
            grid = self.grid[axis]
            if dimension.kind in VANISHING and grid[0]:
                times, grid = np.concatenate([np.zeros_like(times.take([0], axis)), times], axis), (0, *grid)
            times = _interpolated(times, axis, grid, sizes)
        nanoseconds: npt.NDArray[np.int64] = np.round(times * 1e6).astype(np.int64)
        return nanoseconds


def _interpolated(times: Float, axis: int, grid: Sequence[int], sizes: Array) -> Float:
    """Times between the points of a grid along one axis; beyond its ends, those at the ends."""
    place = np.interp(sizes, grid, np.arange(len(grid)))
    below = place.astype(np.int64)
    part = (place - below).reshape([-1 if i == axis else 1 for i in range(times.ndim)])
    above = times.take(np.minimum(below + 1, len(grid) - 1), axis)
    found: Float = times.take(below, axis) * (1 - part) + above * part
    return found


@dataclass(frozen=True)
class LayerLatencies:
    """The latency of every plan of a space, of all kinds but widths that are not rotated.

    Attributes:
        space: the space of the dense model.
        where: what it was measured on: machine, device, threads, batch, input and torch's version.
        dense_ms: milliseconds of a forward of the dense model.
        tables: one for each kind of layer.
        realised: what part of the savings that the tables promise was found in a sliced model.
    """

    space: DimensionSpace
    where: Mapping[str, Any]
    dense_ms: float
    tables: tuple[LayerTable, ...]
    realised: float = 1.0

    def nanoseconds(self, sizes: Array) -> Array:
        """What forwards take.

        Args:
            sizes: dimension sizes in the space's order, shape [..., dimensions].

        Returns:
            Whole nanoseconds, shape [...]; of the dense sizes exactly the measured time.
        """
        flat, offsets, strides, dense = self._lookup
        saved = dense - flat[offsets + self._steps(sizes) @ strides].sum(axis=-1)
        left: Array = round(self.dense_ms * 1e6) - np.round(self.realised * saved).astype(np.int64)
        return left

    def milliseconds(self, sizes: Mapping[str, int]) -> float:
        """What a forward of a plan's model takes, from its sizes."""
        return float(self.nanoseconds(np.array([sizes[n] for n in self.space.dimensions])) / 1e6)

    def _steps(self, sizes: Array) -> Array:
        """The positions of sizes along the axes of the tables."""
        steps = np.array([d.step(STEP) for d in self.space.dimensions.values()], dtype=np.int64)
        return -(-sizes.astype(np.int64) // steps)

    @property
    def timed(self) -> set[str]:
        """The dimensions whose sizes the tables know the time of."""
        return {name for table in self.tables for names in table.layers.values() for name in names}

    @cached_property
    def _lookup(self) -> tuple[Array, Array, Array, int]:
        """All tables in one row; for each layer where its own begins, and the strides of its dimensions in it."""
        column = {name: i for i, name in enumerate(self.space.dimensions)}
        count = sum(len(table.layers) for table in self.tables)
        strides, offsets = np.zeros((len(column), count), dtype=np.int64), np.zeros(count, dtype=np.int64)
        rows, start, layer = [], 0, 0
        for table in self.tables:
            whole = table.whole(self.space)
            for names in table.layers.values():
                offsets[layer] = start
                for axis, name in enumerate(names):
                    strides[column[name], layer] = int(np.prod(whole.shape[axis + 1 :]))
                layer += 1
            rows.append(whole.ravel())
            start += whole.size
        flat = np.concatenate(rows)
        dense = np.array(list(self.space.sizes.values()), dtype=np.int64)
        return flat, offsets, strides, int(flat[offsets + self._steps(dense) @ strides].sum())

    def coupled(self) -> npt.NDArray[np.bool_]:
        """Which dimensions change what a step of another saves, or of their own. Shape [dimensions] * 2."""
        strides = self._lookup[2] > 0
        together: npt.NDArray[np.bool_] = (strides @ strides.T).astype(bool)
        return together

    def tightened(self, realised: float) -> "LayerLatencies":
        """The same tables, of whose savings only this part is believed."""
        return replace(self, realised=realised)

    def digest(self) -> str:
        """A short name of what the tables say."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """The tables as JSON values."""
        return {
            "format": _FORMAT,
            "model": self.space.model,
            "dense": self.space.sizes,
            "where": dict(self.where),
            "dense_ms": self.dense_ms,
            "realised": self.realised,
            "tables": [
                {
                    "layers": {name: list(dims) for name, dims in table.layers.items()},
                    "grid": [list(sizes) for sizes in table.grid],
                    "milliseconds": table.milliseconds,
                }
                for table in self.tables
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the tables as JSON, in one step."""
        write_json(Path(path), self.to_json())


def load_latencies(path: str | Path, space: DimensionSpace) -> LayerLatencies:
    """Read tables for the model that ``space`` describes.

    They may be of another machine than this one, say of the one that the model is for: compare ``where``.

    Raises:
        InputError: the file is missing, damaged, no such tables, or made for a model of another class or sizes.
    """
    data = read_json(Path(path))
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise InputError(f"{path} holds no layer latencies (expected a JSON object with format {_FORMAT!r})")
    if data.get("model") != space.model or data.get("dense") != space.sizes:
        raise InputError(f"{path} was measured for another model ({data.get('model')!r} or other sizes); measure again")
    try:
        tables = tuple(
            LayerTable(
                {name: tuple(dims) for name, dims in table["layers"].items()},
                tuple(tuple(map(int, sizes)) for sizes in table["grid"]),
                table["milliseconds"],
            )
            for table in data["tables"]
        )
        found = LayerLatencies(space, data["where"], float(data["dense_ms"]), tables, float(data["realised"]))
        found._lookup  # noqa: B018  (a damaged table is said now)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); measure again") from None
    return found


def differences(measured: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What is not the same where tables were measured and here, as text; empty if all is."""
    keys = [key for key in here if measured.get(key) != here[key]]
    return ", ".join(f"{key} {measured.get(key)} there, {here[key]} here" for key in keys)


class TimedPlanCosts(PlanCosts):
    """The cost polynomials and the latency of a space: three columns, the third in nanoseconds."""

    def __init__(self, space: DimensionSpace, latencies: LayerLatencies) -> None:
        """Put the tables beside the polynomials.

        Raises:
            InputError: the tables are of a model of other sizes.
        """
        if latencies.space.sizes != space.sizes:
            raise InputError(f"the latencies are of a {latencies.space.model} of other sizes; measure this model's")
        self._latencies = latencies
        super().__init__(space)

    def of(self, sizes: Array) -> Array:
        """Parameters, multiply-adds and nanoseconds; see :meth:`PlanCosts.of`. Shape [..., 3]."""
        return np.concatenate([super().of(sizes), self._latencies.nanoseconds(sizes)[..., None]], axis=-1)

    def coupled(self) -> npt.NDArray[np.bool_]:
        """Which dimensions share a product or a layer. Shape [dimensions] * 2."""
        return super().coupled() | self._latencies.coupled()


def grid_of(dimension: Dimension) -> tuple[int, ...]:
    """The sizes of a dimension that are timed: from the least to the dense one, channels by multiples of ``STEP``."""
    step, size, kind = dimension.step(STEP), dimension.size, dimension.kind
    if dimension.fixed or size <= step:
        return (size,)
    wanted = size * (
        np.array([0.25, 0.5, 1]) if kind in ("width", "channels") else np.linspace(0, 1, 9 if kind == "mlp" else 3)
    )
    found = {max(step, round(w / step) * step) for w in wanted[:-1]}
    return (*sorted(s for s in found if s < size), size)


def combinations(table_grid: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """All points of a grid as positions along its axes, the dense one first."""
    shape = [len(sizes) for sizes in table_grid]
    return [tuple(n - 1 - i for n, i in zip(shape, index, strict=True)) for index in np.ndindex(*shape)]
