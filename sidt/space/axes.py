"""The axis notation: which named dimensions the axes of a tensor are made of.

A line gives one expression for each axis of a tensor, separated by commas::

    heads qk + heads qk + heads v, embed      # attn.qkv.weight: [(H qk + H qk + H v), C]

- Names side by side are a product: the axis is their row-major flattening, so ``heads qk`` has index
  ``head * qk_size + unit``. A number is a product's unnamed factor: ``4 embed`` is four blocks of ``embed``.
- ``+`` is concatenation.
- A sum in parentheses is the last factor of a product: ``heads (qk + qk + v)`` has the q, k and v units of the first
  head, then those of the next.
- ``_`` is an axis that is never searched; it has the size that the tensor has.
- ``name!`` says that the name must stay whole, because statistics are taken over it here.
- ``name?`` is a factor of 1 while the name has units and of 0 when it has none: ``heads? embed`` is ``embed`` as
  long as there is a head, and nothing after that; ``heads? _`` is never searched, and goes with the last head.
  Of an axis that only attributes have, it chooses an alternative: ``first? heads (qk + v) || heads qk + heads v``.
  ``enters? embed.{s-1} || embed`` is the width before where the block has the module that the attribute is of.
- ``|`` separates whole alternatives; the one whose sizes fit the tensor is taken.
- ``||`` separates them in order; the first whose dimensions the model has, and whose sizes fit, is taken: a head reads
  ``pooled || embed``, what a pooling gives if there is one that has a width of its own.
- ``embed.{s-1}`` is the instance of ``embed`` with that index; ``{-1}`` is the last one. A bare name takes
  the indices of the line it stands in. What would stand before the first (``{s-1}`` where s is 0) is what the
  model is given, and has the size that the tensor has, as ``_``.

This module knows text, sizes and indices; it knows neither models nor files.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sidt.errors import InputError

Array = npt.NDArray[np.int64]


class Present(int):
    """``name?``: the number 1, as long as the dimension ``of`` has units."""

    of: str

    def __new__(cls, of: str) -> "Present":
        """The factor for one dimension."""
        present = super().__new__(cls, 1)
        present.of = of
        return present


class Part(tuple[Any, ...]):
    """A product with one summand of a sum in parentheses; those of the same sum stand next to each other.

    ``heads (qk + v)`` is the products ``heads qk`` and ``heads v``, whose entries take turns for each unit of the first
    ``shared`` factors. The one that is ``first`` in its sum says so.
    """

    shared: int
    first: bool

    def __new__(cls, factors: Any = (), shared: int = 0, first: bool = True) -> "Part":
        """The product of some factors."""
        part = super().__new__(cls, factors)
        part.shared, part.first = shared, first
        return part


# A bound axis: a sum of products of dimension names and plain numbers.
Term = tuple[str | int, ...]
Axis = tuple[Term, ...]


class Stretch(NamedTuple):
    """Entries along an axis: a product of the sizes ``shape``, of which a reduction keeps the axes ``kept``."""

    at: tuple[int, ...]
    shape: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Factor:
    """One symbol of a parsed line: a number, ``_`` (both ``None``), or a name with index expressions."""

    name: str | None = None
    number: int | None = None
    indices: tuple[str, ...] | None = None  # None: those of the line
    fixed: bool = False
    presence: bool = False


ParsedAxis = tuple[tuple[Factor, ...], ...]
ParsedLine = tuple[ParsedAxis, ...]

_FACTOR = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_]*)(?P<indices>(?:\.\{[^{}]+\})*)(?P<mark>[!?]?)")
_PLUS = re.compile(r"\+(?![^{}]*\})(?![^()]*\))")  # not that of {s+1}, and not one in parentheses
_SUM = re.compile(r"(?P<outer>[^()]*[^()\s][^()]*)\((?P<inner>[^()]*)\)\s*")
_INDEX = re.compile(r"(?:(?P<variable>[a-z])\s*)?(?P<offset>[+-]?\s*\d+)?")


def _parse_factor(token: str, line: str) -> Factor:
    if token == "_":
        return Factor()
    if token.isdecimal() and int(token) > 0:
        return Factor(number=int(token))
    match = _FACTOR.fullmatch(token)
    if match is None:
        raise InputError(f"cannot read {token!r} in the axes {line!r}; write a name, a number or _")
    found = tuple(re.findall(r"\{([^{}]+)\}", match["indices"]))
    return Factor(match["name"], indices=found or None, fixed=match["mark"] == "!", presence=match["mark"] == "?")


def _parse_terms(axis: str, line: str) -> Iterator[tuple[Factor, ...]]:
    for term in _PLUS.split(axis):
        if (match := _SUM.fullmatch(term)) is None:
            yield tuple(_parse_factor(token, line) for token in term.split())
            continue
        outer = tuple(_parse_factor(token, line) for token in match["outer"].split())
        for number, summand in enumerate(_PLUS.split(match["inner"])):
            inner = tuple(_parse_factor(token, line) for token in summand.split())
            yield Part((*outer, *inner), len(outer), number == 0) if inner else ()


def parse_line(line: str) -> tuple[ParsedLine, ...]:
    """Parse one line into its alternatives, each a tuple with one entry per tensor axis.

    Raises:
        InputError: the line is not in the notation.
    """
    alternatives = []
    for alternative in re.split(r"\|{1,2}", line):
        axes = []
        for axis in alternative.split(","):
            terms = tuple(_parse_terms(axis, line))
            if not all(terms):
                raise InputError(f"empty axis or term in the axes {line!r}; write _ for an axis that is not searched")
            own = [f for term in terms for f in term if f == Factor()]
            if own and (len(own) > 1 or len(terms) > 1 or not all(f.presence for f in terms[0] if f != Factor())):
                raise InputError(f"_ must stand alone in its axis, or behind name?, but got {line!r}")
            axes.append(terms)
        alternatives.append(tuple(axes))
    return tuple(alternatives)


def evaluate_index(expression: str, variables: Mapping[str, int], last: int) -> int:
    """Evaluate ``i``, ``i-1``, ``2`` or ``-1`` (counted from ``last``, as in Python) to an index.

    Raises:
        InputError: the expression is malformed, or names a variable that the line does not have.
    """
    match = _INDEX.fullmatch(expression.strip())
    if match is None or not match.group():
        raise InputError(f"cannot read the index {{{expression}}}; write a variable, a number, or {{i-1}}")
    offset = int((match["offset"] or "0").replace(" ", ""))
    if match["variable"] is None:
        return offset if offset >= 0 else last + 1 + offset
    if match["variable"] not in variables:
        raise InputError(
            f"the index {{{expression}}} uses a variable its line does not have; it has {sorted(variables)}"
        )
    return variables[match["variable"]] + offset


def bind(axis: ParsedAxis, extent: int, resolve: Callable[[Factor], str]) -> Axis:
    """Replace every name by the dimension it stands for, and ``_`` by the tensor's own ``extent``."""

    def symbol(factor: Factor) -> str | int:
        if factor.name is not None:
            return Present(resolve(factor)) if factor.presence else resolve(factor)
        return extent if factor.number is None else factor.number

    def product(term: tuple[Factor, ...]) -> Term:
        bound = tuple(symbol(f) for f in term)
        return Part(bound, term.shared, term.first) if isinstance(term, Part) else bound

    return tuple(product(term) for term in axis)


def names(axis: Axis) -> set[str]:
    """The dimensions that occur in an axis, other than as ``name?``."""
    return {s for term in axis for s in term if isinstance(s, str)}


def presences(axis: Axis) -> set[str]:
    """The dimensions that occur in an axis as ``name?``."""
    return {s.of for term in axis for s in term if isinstance(s, Present)}


def chosen(axis: Axis, dimensions: Set[str]) -> Axis:
    """An axis without ``name?`` of what is no dimension, which has done its part."""

    def product(term: Term) -> Term:
        gone = [i for i, s in enumerate(term) if isinstance(s, Present) and s.of not in dimensions]
        left = tuple(s for i, s in enumerate(term) if i not in gone)
        return Part(left, term.shared - len(gone), term.first) if isinstance(term, Part) else left

    return tuple(product(term) for term in axis)


def symbol_size(symbol: str | int, sizes: Mapping[str, int]) -> int:
    """The number that one symbol of a product stands for."""
    if isinstance(symbol, Present):
        return min(sizes[symbol.of], 1)
    return symbol if isinstance(symbol, int) else sizes[symbol]


def term_size(term: Term, sizes: Mapping[str, int]) -> int:
    """The number of entries of one product."""
    size = 1
    for symbol in term:
        size *= symbol_size(symbol, sizes)
    return size


def axis_size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The number of entries along an axis."""
    return sum(term_size(term, sizes) for term in axis)


def solve(axis: Axis, extent: int, sizes: Mapping[str, int]) -> tuple[str, int] | None:
    """Find the size of the one dimension of ``axis`` that ``sizes`` lacks.

    Returns:
        Its name and size, which may be 0; ``None`` when more than one is unknown, none is, no whole size fits, or
        any would (it is multiplied by 0).
    """
    unknown = names(axis) - set(sizes)
    if len(unknown) != 1 or not presences(axis) <= set(sizes):
        return None
    (name,) = unknown
    known = slope = 0
    for term in axis:
        power = term.count(name)
        if power > 1:
            return None
        rest = term_size(tuple(s for s in term if s != name), sizes)
        known, slope = (known, slope + rest) if power else (known + rest, slope)
    if slope == 0:
        return None
    size, remainder = divmod(extent - known, slope)
    return (name, size) if size >= 0 and remainder == 0 else None


def layout(axis: Axis, sizes: Mapping[str, int]) -> list[tuple[Term, Array]]:
    """Each product of an axis, and the positions of its entries: an array with an axis for each factor."""
    begins = [i for i, term in enumerate(axis) if not isinstance(term, Part) or term.first]
    found: list[tuple[Term, Array]] = []
    start = 0
    for first, end in pairwise([*begins, len(axis)]):
        shared = term.shared if isinstance(term := axis[first], Part) else 0
        rows = term_size(term[:shared], sizes)
        widths = [term_size(t[shared:], sizes) for t in axis[first:end]]
        for each, width, offset in zip(axis[first:end], widths, np.cumsum([0, *widths]), strict=False):
            positions = start + offset + sum(widths) * np.arange(rows)[:, None] + np.arange(width)
            found.append((each, positions.reshape([symbol_size(s, sizes) for s in each])))
        start += rows * sum(widths)
    return found


def kept_indices(axis: Axis, sizes: Mapping[str, int], keep: Mapping[str, Array], per: Mapping[str, str]) -> Array:
    """The positions along a tensor axis that stay when each dimension keeps only ``keep``.

    Args:
        axis: the axis of the tensor.
        sizes: the dense size of each dimension.
        keep: kept indices, perhaps none; shape [kept], or [kept parents, kept] for a dimension of ``per``.
        per: the dimensions chosen separately for each unit of a parent, and their parent.

    Returns:
        Indices into the dense axis, shape [kept positions], in order.
    """
    parts = []
    for term, positions in layout(axis, sizes):
        index = []
        for position, symbol in enumerate(term):
            shape = [1] * len(term)
            size = symbol_size(symbol, sizes)
            parent = None if isinstance(symbol, int) else per.get(symbol)
            if isinstance(symbol, Present):
                kept = np.arange(min(keep[symbol.of].shape[-1], size))
            elif isinstance(symbol, int) or (parent is not None and parent not in term):
                kept = np.arange(size)  # a name without its parent is one that must stay whole
            else:
                kept = keep[symbol]
                if parent is not None:  # one row for each kept unit of the parent
                    shape[term.index(parent)] = kept.shape[0]
            shape[position] = kept.shape[-1]
            index.append(kept.reshape(shape))
        parts.append(positions[tuple(index)].reshape(-1))
    found = np.concatenate(parts)
    return np.sort(found) if any(isinstance(term, Part) for term in axis) else found


def views(axis: Axis, sizes: Mapping[str, int], name: str, per: Mapping[str, str]) -> list[Stretch]:
    """Where one dimension lives along an axis, as views for a reduction.

    Returns:
        For each term that holds ``name``: its entries, and which axes of their product to keep (the parent of ``name``,
        if it has one, and ``name``); all others are to be summed.
    """
    found = []
    for term, positions in layout(axis, sizes):
        # Without its parent, a dimension is one that must stay whole: no unit has a score of its own here.
        if name in term and per.get(name, name) in term:
            kept = (term.index(name),) if name not in per else (term.index(per[name]), term.index(name))
            found.append(Stretch(tuple(positions.reshape(-1).tolist()), positions.shape, kept))
    return found
