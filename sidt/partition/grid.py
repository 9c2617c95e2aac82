"""A sublayer's grid cut in rectangles over devices, and what each of them computes and moves.

Devices with the same range of rows form a strip; they cut its units among them. After a sublayer its output must be
whole on every device, in two rounds of messages:

1. within a strip, whose members hold partial sums: each member sums a part of the strip's rows, its own, and is sent
   the others' partial sums of them;
2. each device sends its own rows to all others.

A strip of one device skips the first round: cutting rows moves about half the bytes that cutting units does, but each
device then needs every unit in its memory. That is what a plan trades.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sidt.partition.devices import Device
from sidt.partition.workload import Sublayer

Span = tuple[int, int]  # first, last + 1


@dataclass(frozen=True)
class Cell:
    """The rectangle of one device; without rows or units it computes nothing."""

    rows: Span = (0, 0)
    units: Span = (0, 0)

    @property
    def height(self) -> int:
        """Rows."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Units."""
        return self.units[1] - self.units[0]

    @property
    def empty(self) -> bool:
        """Whether nothing is in it."""
        return not self.height or not self.width


@dataclass(frozen=True)
class Grid:
    """One sublayer over all devices.

    Attributes:
        sublayer: what is cut.
        cells: one for each device.
    """

    sublayer: Sublayer
    cells: tuple[Cell, ...]

    @cached_property
    def owned(self) -> tuple[Span, ...]:
        """The rows that each device sums and sends: an even part of its strip's."""
        found = []
        for index, cell in enumerate(self.cells):
            strip = self.strip(index)
            place = strip.index(index) if strip else 0
            ends = [cell.rows[0] + cell.height * k // max(len(strip), 1) for k in (place, place + 1)]
            found.append((ends[0], ends[1]) if strip else (0, 0))
        return tuple(found)

    @cached_property
    def _strips(self) -> dict[Span, list[int]]:
        found: dict[Span, list[int]] = {}
        for index, cell in enumerate(self.cells):
            if not cell.empty:
                found.setdefault(cell.rows, []).append(index)
        return found

    def strip(self, index: int) -> list[int]:
        """The devices that have the rows of one of them, with it; none if its cell is empty."""
        cell = self.cells[index]
        return [] if cell.empty else self._strips[cell.rows]

    def macs(self, index: int) -> float:
        """Multiply-adds of one device."""
        cell, s = self.cells[index], self.sublayer
        return 0.0 if cell.empty else cell.height * (cell.width * s.unit_macs + s.shared_macs)

    def moved(self, index: int) -> int:
        """Bytes that one device sends and receives."""
        count = len(self.cells)
        if count == 1:
            return 0
        own, strip = self.owned[index][1] - self.owned[index][0], self.strip(index)
        partial = (self.cells[index].height - own) + own * (len(strip) - 1) if strip else 0
        whole = own * (count - 1) + self.sublayer.rows - own
        return (partial + whole) * self.sublayer.row_bytes

    def rounds(self, index: int) -> int:
        """Rounds of messages that one device waits for."""
        return int(len(self.strip(index)) > 1) + int(len(self.cells) > 1)

    def times(self, devices: Sequence[Device]) -> list[tuple[float, float]]:
        """Seconds that each device computes, and that its link is in use."""
        return [
            (self.macs(i) / d.capacity, self.moved(i) / d.link + self.rounds(i) * d.latency)
            for i, d in enumerate(devices)
        ]

    def seconds(self, devices: Sequence[Device]) -> float:
        """Seconds until the slowest device has computed and sent."""
        return max(compute + link for compute, link in self.times(devices))

    def covered_once(self) -> bool:
        """Whether every row and unit is in exactly one cell."""
        cells = [c for c in self.cells if not c.empty]
        apart = all(
            a.rows[1] <= b.rows[0] or b.rows[1] <= a.rows[0] or a.units[1] <= b.units[0] or b.units[1] <= a.units[0]
            for k, a in enumerate(cells)
            for b in cells[:k]
        )
        inside = all(c.rows[0] >= 0 and c.rows[1] <= self.sublayer.rows for c in cells) and all(
            c.units[0] >= 0 and c.units[1] <= self.sublayer.units for c in cells
        )
        return apart and inside and sum(c.height * c.width for c in cells) == self.sublayer.rows * self.sublayer.units
