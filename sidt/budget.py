"""The budget: upper bounds on parameters and multiply-adds, absolute or as a fraction of the dense model."""

import math
import re
from dataclasses import dataclass

from sidt.errors import InputError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Budget:
    """Upper bounds that a plan must meet; at least one.

    A float in (0, 1] is the part of the dense model that may stay (0.6: 40 % fewer); an int above 1, or text such
    as ``"2.5G"`` or ``"13M"``, is an absolute number.

    Attributes:
        params: parameters.
        macs: multiply-adds for one image of the space's input size.

    Raises:
        InputError: no bound is given, or one is zero, negative, NaN, or a fraction over 1.
    """

    params: float | int | str | None = None
    macs: float | int | str | None = None

    def __post_init__(self) -> None:
        """Check both bounds."""
        if self.params is None and self.macs is None:
            raise InputError(
                "a budget needs params= or macs=, for example Budget(params=0.6) for 40 % fewer parameters"
            )
        for name in ("params", "macs"):
            _parse(name, getattr(self, name))

    def bounds(self, dense_params: int, dense_macs: int) -> tuple[int | None, int | None]:
        """The largest whole numbers of parameters and multiply-adds that are allowed."""
        dense = (dense_params, dense_macs)
        parsed = (_parse("params", self.params), _parse("macs", self.macs))
        # The tiny slack keeps 0.1 * 30 from becoming 2.
        limits = [
            None if p is None else math.floor(p * d + 1e-6) if p <= 1 else math.floor(p)
            for p, d in zip(parsed, dense, strict=True)
        ]
        return limits[0], limits[1]

    def __str__(self) -> str:
        """The bounds as they were given."""
        return ", ".join(f"{n}={v}" for n in ("params", "macs") if (v := getattr(self, n)) is not None)


def _parse(name: str, value: float | int | str | None) -> float | None:
    if value is None:
        return None
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
