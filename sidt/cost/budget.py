"""The budget: upper bounds on parameters, multiply-adds and latency, absolute or a fraction of the dense model's."""

import math
import re
from dataclasses import dataclass

from sidt.errors import InputError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NANOSECONDS = {"s": 1e9, "ms": 1e6, "us": 1e3}
BOUNDS = ("params", "macs", "latency")


@dataclass(frozen=True)
class Budget:
    """Upper bounds that a plan must meet; at least one.

    A float in (0, 1] is the part of the dense model that may stay (0.6: 40 % fewer); an int above 1, or text such
    as ``"2.5G"`` or ``"13M"``, is an absolute number.

    Attributes:
        params: parameters.
        macs: multiply-adds for one image of the space's input size.
        latency: time of a forward, as text such as ``"20ms"``, ``"0.02s"`` or ``"800us"``, or a fraction of the dense
            model's. It is that of measured layers (:func:`sidt.measure_layers`): of their machine and batch.

    Raises:
        InputError: no bound is given, or one is zero, negative, NaN, or a fraction over 1, or a time has no unit.
    """

    params: float | int | str | None = None
    macs: float | int | str | None = None
    latency: float | str | None = None

    def __post_init__(self) -> None:
        """Check every bound."""
        if not self.bounded:
            raise InputError(
                "a budget needs params=, macs= or latency=, for example Budget(params=0.6) for 40 % fewer parameters"
            )
        for name in BOUNDS:
            _parse(name, getattr(self, name))

    @property
    def bounded(self) -> list[str]:
        """The names of what has a bound."""
        return [name for name in BOUNDS if getattr(self, name) is not None]

    @property
    def fractions(self) -> list[float]:
        """The bounds that are a part of the dense model."""
        parsed = [_parse(name, getattr(self, name)) for name in self.bounded]
        return [part for part in parsed if part is not None and part <= 1]

    def bounds(self, *dense: int) -> tuple[int | None, ...]:
        """The largest whole numbers that are allowed.

        Args:
            dense: parameters and multiply-adds of the dense model, and nanoseconds where its layers were measured.

        Returns:
            One for each number that is given.

        Raises:
            InputError: a latency is bounded that was not measured.
        """
        if self.latency is not None and len(dense) < len(BOUNDS):
            raise InputError(
                f"the budget latency={self.latency!r} needs measured layers: give allocate() or search() "
                f"latencies=sidt.measure_layers(model, space), or use `sidt search`, which measures them"
            )
        parsed = [_parse(name, getattr(self, name)) for name in BOUNDS[: len(dense)]]
        # The tiny slack keeps 0.1 * 30 from becoming 2.
        return tuple(
            None if p is None else math.floor(p * d + 1e-6) if p <= 1 else math.floor(p)
            for p, d in zip(parsed, dense, strict=True)
        )

    def on_the_way(self, dense: tuple[int, ...], part: float) -> "Budget":
        """The absolute budget a part of the way from the dense model to this one, by equal factors.

        Args:
            dense: as for :meth:`bounds`.
            part: 0 is the dense model, 1 is this budget.
        """
        limits = [
            None if limit is None else max(math.floor(whole * min(limit / whole, 1.0) ** part + 1e-6), 2)
            for limit, whole in zip(self.bounds(*dense), dense, strict=True)
        ]
        params, macs, latency = (*limits, None)[: len(BOUNDS)]
        return Budget(params, macs, None if latency is None else f"{latency / 1e3:.3f}us")

    def __str__(self) -> str:
        """The bounds as they were given."""
        return ", ".join(f"{n}={v}" for n in BOUNDS if (v := getattr(self, n)) is not None)


def _parse(name: str, value: float | int | str | None) -> float | None:
    if value is None:
        return None
    if name == "latency":
        return _parse_latency(value)
    number: float
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kMGT]?)\s*", value)
        if match is None:
            raise InputError(f"budget {name}={value!r} is not a number; write a fraction (0.6), a count, or 2.5G")
        number = float(match[1]) * _UNITS[match[2]]
        whole = bool(match[2]) or number == int(number)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"budget {name}={value!r} is not a number; write a fraction (0.6), a count, or '2.5G'")
    else:
        number, whole = float(value), isinstance(value, int)
    if not math.isfinite(number) or number <= 0:
        raise InputError(f"budget {name}={value!r} must be above 0 and finite; 0.6 keeps 60 % of the dense model")
    if number > 1 and not whole:
        raise InputError(
            f"budget {name}={value!r} is a fraction over 1; write at most 1, or a whole number for a count"
        )
    return number


def _parse_latency(value: object) -> float:
    """A fraction of the dense model's, or nanoseconds (above 1)."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|ms|us|)\s*", value if isinstance(value, str) else "")
    if match is not None:
        number, unit = float(match[1]), match[2]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        raise InputError(f"budget latency={value!r} is no time; write '20ms', '0.02s', '800us', or a fraction (0.6)")
    if not math.isfinite(number) or number <= 0:
        raise InputError(f"budget latency={value!r} must be above 0 and finite; 0.6 is 60 % of the dense model's")
    if not unit and number > 1:
        raise InputError(f"budget latency={value!r} has no unit; write '{value}ms', or a fraction of at most 1")
    return max(number * _NANOSECONDS[unit], 2.0) if unit else number
