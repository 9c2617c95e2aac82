"""Greedy Two Dimensional Partition: the sublayers of a model over unequal devices, under their memory.

After MeDNN (Mao et al., ICCAD 2017), whose phones share the rows and columns of convolutions: here rows are windows,
tokens or images and columns are heads or hidden units (:mod:`sidt.partition.workload`). A forward takes, summed over
its sublayers, ``max over devices (load / capacity + bytes / bandwidth)``, and greedy it is in four places:

- memory is handed out first: in proportion, so that a device that holds a third of the parameters gets about a third
  of each sublayer's units, or as long as there is some; the sublayers of the largest units first, or those that do most
  with a byte; of these four the best is taken, after each sublayer was cut once more under what is left;
- a sublayer starts as one strip of rows for each device, and the two strips whose union is fastest become one, until
  one is left; the fastest of these arrangements is taken;
- rows go to strips, and units to the devices of a strip, in proportion, then one by one to whoever ends first;
- devices are left out one at a time, whoever is missed least, and the fastest of these sets is taken; the first, which
  has the images, stays.

Memory is that of the parameters; activations are not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from heapq import heapify, heappop, heapreplace
from itertools import combinations
from math import inf
from typing import Any

from sidt.errors import InputError
from sidt.partition.devices import Device
from sidt.partition.grid import Cell, Grid
from sidt.partition.workload import Sublayer, Workload

_FORMAT = "sidt-partition-1"


@dataclass(frozen=True)
class Partition:
    """A model cut over devices.

    Attributes:
        workload: what was cut.
        devices: those that take part; the first has the images.
        grids: one for each sublayer, in the model's order.
    """

    workload: Workload
    devices: tuple[Device, ...]
    grids: tuple[Grid, ...]

    def times(self, index: int) -> tuple[float, float]:
        """Seconds that a device computes in a forward, and that its link is in use; waiting for others is neither."""
        pairs = [self._start()[index], *(grid.times(self.devices)[index] for grid in self.grids)]
        return sum(p[0] for p in pairs), sum(p[1] for p in pairs)

    @property
    def seconds(self) -> float:
        """Seconds of a forward."""
        return max(map(sum, self._start())) + sum(grid.seconds(self.devices) for grid in self.grids)

    @property
    def alone(self) -> float:
        """Seconds of a forward on the fastest of the devices, whether or not it has the memory."""
        return self.workload.macs / max(d.capacity for d in self.devices)

    def moved(self, index: int) -> int:
        """Bytes that a device sends and receives in a forward."""
        others = len(self.devices) - 1
        images = self.workload.image_bytes * (others if index == 0 else 1) if others else 0
        return images + sum(grid.moved(index) for grid in self.grids)

    def shard_bytes(self, index: int) -> int:
        """Bytes of the parameters of a device."""
        return self.workload.rest_bytes + sum(_held(grid)[index] for grid in self.grids)

    def share(self, index: int, kind: str) -> tuple[float, float]:
        """Of the sublayers of a kind the mean part of the rows that a device has, and of the units."""
        own = [g for g in self.grids if g.sublayer.kind == kind]
        rows = sum(g.cells[index].height / g.sublayer.rows for g in own)
        units = sum(g.cells[index].width / g.sublayer.units for g in own)
        return rows / max(len(own), 1), units / max(len(own), 1)

    def on(self, workload: Workload, devices: Sequence[Device]) -> "Partition":
        """The same cells with other loads and devices, such as measured ones."""
        grids = zip(self.grids, workload.sublayers, strict=True)
        return Partition(workload, tuple(devices), tuple(Grid(s, g.cells) for g, s in grids))

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: of each sublayer the rows and units of every device."""
        devices = []
        for index, device in enumerate(self.devices):
            compute, link = self.times(index)
            predicted = {"compute_seconds": compute, "link_seconds": link, "moved_bytes": self.moved(index)}
            devices.append({**device.model_dump(), "shard_bytes": self.shard_bytes(index), **predicted})
        return {
            "format": _FORMAT,
            "images": self.workload.images,
            "seconds": self.seconds,
            "alone_seconds": self.alone,
            "devices": devices,
            "sublayers": [
                {
                    "module": g.sublayer.owner,
                    "dimension": g.sublayer.dimension,
                    "rows": g.sublayer.rows,
                    "units": g.sublayer.units,
                    "cells": [{"rows": list(c.rows), "units": list(c.units)} for c in g.cells],
                }
                for g in self.grids
            ],
        }

    def _start(self) -> list[tuple[float, float]]:
        """Compute and link seconds of what every device does for itself, once the images are there."""
        others, found = len(self.devices) - 1, []
        for index, device in enumerate(self.devices):
            sent = self.workload.image_bytes * (others if index == 0 else 1)
            link = sent / device.link + device.latency if others else 0.0
            found.append((self.workload.rest_macs / device.capacity, link))
        return found


def partition(workload: Workload, devices: Sequence[Device]) -> Partition:
    """Cut a model over devices.

    Args:
        workload: of :func:`workload_of`.
        devices: the first has the images; all must say how fast they are.

    Raises:
        InputError: a device has no memory for any shard, or all together have none for the model.
    """
    for device in devices:
        least = workload.rest_bytes + min(s.bytes_of(1) for s in workload.sublayers)
        if device.memory < least:
            raise InputError(
                f"{device.name} has no memory for any shard: it has {device.memory:,.0f} bytes and the least shard is "
                f"{least:,} ({workload.rest_bytes:,} of them what every device holds); give it more, or leave it out"
            )
    best = _cut_all(workload, tuple(devices))
    if best is None:
        together = sum(device.memory - workload.rest_bytes for device in devices)
        raise InputError(
            f"no cut of the model fits into {', '.join(d.name for d in devices)}: beside the "
            f"{workload.rest_bytes:,} bytes that each holds, {together:,.0f} are left together and "
            f"{workload.bytes - workload.rest_bytes:,} are needed, in whole heads; add memory or a device"
        )
    fewest = best
    while len(fewest.devices) > 1:
        fewer = [fewest.devices[:i] + fewest.devices[i + 1 :] for i in range(1, len(fewest.devices))]
        found = [p for d in fewer if (p := _cut_all(workload, d)) is not None]
        if not found:
            break
        fewest = min(found, key=_seconds)
        best = min(best, fewest, key=_seconds)
    return best


def _seconds(found: Partition) -> float:
    return found.seconds


def _cut_all(workload: Workload, devices: tuple[Device, ...]) -> Partition | None:
    """All sublayers over all of some devices; ``None`` if memory does not allow it."""
    orders = (
        sorted(workload.sublayers, key=lambda s: -s.unit_bytes),
        sorted(workload.sublayers, key=lambda s: -s.macs / s.bytes_of(s.units)),
    )
    found = [
        cut for order in orders for fair in (True, False) if (cut := _handed_out(workload, devices, order, fair=fair))
    ]
    return min(map(_improved, found), key=_seconds, default=None)


def _handed_out(
    workload: Workload, devices: tuple[Device, ...], order: Sequence[Sublayer], *, fair: bool
) -> Partition | None:
    """Cut sublayer by sublayer, each under its part of the memory, or under all that is left.

    ``None`` if a sublayer finds too little.
    """
    room = [device.memory - workload.rest_bytes for device in devices]
    total = workload.bytes - workload.rest_bytes
    parts = [min(r / total, 1.0) for r in room]
    used, passed = [0] * len(devices), 0
    grids: dict[str, Grid] = {}
    for sublayer in order:
        passed += sublayer.bytes_of(sublayer.units)
        left = [r - u for r, u in zip(room, used, strict=True)]
        own = [part * passed - u for part, u in zip(parts, used, strict=True)] if fair else left
        allowed = _lent(sublayer, [_units_in(sublayer, memory) for memory in own], left)
        if allowed is None:
            return None
        grid = _grid(sublayer, devices, allowed)
        grids[sublayer.owner] = grid
        used = [u + b for u, b in zip(used, _held(grid), strict=True)]
    return Partition(workload, devices, tuple(grids[s.owner] for s in workload.sublayers))


def _improved(found: Partition) -> Partition:
    """The same with sublayers cut again under what is left, one after the other, as long as any becomes faster."""
    grids, gained = list(found.grids), True
    left = [device.memory - found.shard_bytes(i) for i, device in enumerate(found.devices)]
    while gained:
        gained = False
        for place, old in enumerate(grids):
            free = [room + held for room, held in zip(left, _held(old), strict=True)]
            new = _grid(old.sublayer, found.devices, tuple(_units_in(old.sublayer, memory) for memory in free))
            if new.seconds(found.devices) < old.seconds(found.devices):
                grids[place], gained = new, True
                left = [room - held for room, held in zip(free, _held(new), strict=True)]
    return Partition(found.workload, found.devices, tuple(grids))


def _held(grid: Grid) -> list[int]:
    """Bytes of a sublayer's parameters on each device."""
    return [grid.sublayer.bytes_of(0 if cell.empty else cell.width) for cell in grid.cells]


def _grid(sublayer: Sublayer, devices: tuple[Device, ...], allowed: tuple[int, ...]) -> Grid:
    return Grid(sublayer, _cells(replace(sublayer, dimension="", owner=""), devices, allowed))


def _units_in(sublayer: Sublayer, memory: float) -> int:
    """How many units of a sublayer fit into some bytes."""
    units = int((memory - sublayer.shared_bytes) // max(sublayer.unit_bytes, 1))
    return min(max(units, 0), sublayer.units)


def _lent(sublayer: Sublayer, fair: Sequence[int], left: Sequence[float]) -> tuple[int, ...] | None:
    """The units that each device may have, where the fair ones are too few with more from what all have left."""
    allowed = list(fair)
    while sum(allowed) < sublayer.units:
        after = [
            room - sublayer.bytes_of(units + 1) if units < sublayer.units else -inf
            for units, room in zip(allowed, left, strict=True)
        ]
        most = max(range(len(after)), key=after.__getitem__)
        if after[most] < 0:
            return None
        allowed[most] += 1
    return tuple(allowed)


@lru_cache(maxsize=4096)
def _cells(sublayer: Sublayer, devices: tuple[Device, ...], allowed: tuple[int, ...]) -> tuple[Cell, ...]:
    """The cells of one sublayer: strips are merged two by two, and the fastest arrangement on the way is taken."""

    @cache  # arrangements share all strips but one
    def strip(members: tuple[int, ...]) -> tuple[list[int], float]:
        return _strip(sublayer, devices, allowed, members)

    def judged(strips: tuple[tuple[int, ...], ...]) -> tuple[float, int, tuple[tuple[int, ...], ...], Grid | None]:
        grid = _arranged(sublayer, len(devices), {members: strip(members) for members in strips})
        nearest = max((have for s in strips if (have := sum(allowed[i] for i in s)) < sublayer.units), default=0)
        return (inf if grid is None else grid.seconds(devices)), -nearest, strips, grid

    best = current = judged(tuple((i,) for i in range(len(devices))))
    while len(current[2]) > 1:
        merged = []
        for first, second in combinations(current[2], 2):
            others = tuple(s for s in current[2] if s not in (first, second))
            merged.append(judged((*others, tuple(sorted(first + second)))))
        current = min(merged, key=lambda m: m[:2])
        best = min(best, current, key=lambda m: m[0])
    assert best[3] is not None  # one strip of all devices has all units
    return best[3].cells


def _strip(
    sublayer: Sublayer, devices: Sequence[Device], allowed: Sequence[int], members: Sequence[int]
) -> tuple[list[int], float]:
    """The units of each member of a strip, and how many rows it does a second: none if it may not have all units."""
    if sum(allowed[i] for i in members) < sublayer.units:
        return [0] * len(members), 0.0
    widths = _dealt(sublayer.units, [devices[i].capacity for i in members], [allowed[i] for i in members])
    return widths, 1 / _row_seconds(sublayer, devices, widths, members)


def _arranged(sublayer: Sublayer, count: int, strips: Mapping[tuple[int, ...], tuple[list[int], float]]) -> Grid | None:
    """The grid of some strips over all devices; one without speed gets no row. ``None`` if none has any."""
    speeds = [speed for _, speed in strips.values()]
    if not any(speeds):
        return None
    cells, row = [Cell()] * count, 0
    for (members, (widths, _)), height in zip(strips.items(), _dealt(sublayer.rows, speeds), strict=True):
        unit = 0
        for index, width in zip(members, widths, strict=True):
            if height and width:
                cells[index] = Cell((row, row + height), (unit, unit + width))
            unit += width
        row += height
    return Grid(sublayer, tuple(cells))


def _row_seconds(sublayer: Sublayer, devices: Sequence[Device], widths: Sequence[int], members: Sequence[int]) -> float:
    """Seconds that one more row takes a strip of some devices, each with so many units."""
    taking = [(devices[i], width) for i, width in zip(members, widths, strict=True) if width]
    count = len(taking)
    rows_moved = 2 + (len(devices) - 4) / count if len(devices) > 1 else 0.0  # see Grid.moved: of one row
    return max(
        (width * sublayer.unit_macs + sublayer.shared_macs) / device.capacity
        + max(rows_moved, 0.0) * sublayer.row_bytes / device.link
        for device, width in taking
    )


def _dealt(count: int, speeds: Sequence[float], most: Sequence[int] | None = None) -> list[int]:
    """Equal pieces to unequal speeds: in proportion, then one by one to whoever ends first."""
    caps = [count if speed else 0 for speed in speeds] if most is None else most
    total = sum(speed for speed, cap in zip(speeds, caps, strict=True) if cap)
    given = [min(int(count * s / total), cap) for s, cap in zip(speeds, caps, strict=True)]
    ends = [((have + 1) / speeds[i], i) for i, have in enumerate(given) if have < caps[i]]
    heapify(ends)
    for _ in range(count - sum(given)):
        first = ends[0][1]
        given[first] += 1
        if given[first] < caps[first]:
            heapreplace(ends, ((given[first] + 1) / speeds[first], first))
        else:
            heappop(ends)
    return given
