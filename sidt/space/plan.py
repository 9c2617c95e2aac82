"""The dimension plan: which units of every dimension are kept. The artifact that everything exchanges."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidt.errors import InputError
from sidt.files import read_json, write_json
from sidt.space.axes import Array
from sidt.space.space import VANISHING, Dimension, DimensionSpace

_FORMAT = "sidt-plan-1"


@dataclass(frozen=True, eq=False)
class DimensionPlan:
    """The kept units of every dimension of a space.

    Attributes:
        space: the space of the dense model.
        keep: for each dimension the kept indices in ascending order; shape [kept], or [kept parents, kept]
            for a dimension whose units are chosen for each unit of its parent (rows in the order of the kept
            parents). Dimensions left out are kept whole. Heads and mlp may keep none: their sublayer then only adds
            its output bias. Below no heads, qk and v have no row and count as one unit, shape [0, 1].

    Raises:
        InputError: a name is unknown, or indices are out of range, repeated, of the wrong shape, or none where
            there must be some.
    """

    space: DimensionSpace
    keep: Mapping[str, Array]

    def __post_init__(self) -> None:
        """Check every entry and fill in the dimensions that are kept whole."""
        unknown = sorted(set(self.keep) - set(self.space.dimensions))
        if unknown:
            raise InputError(
                f"the plan names {unknown[0]!r}, which is no dimension of this {self.space.model}; {_known(self.space)}"
            )
        keep: dict[str, Array] = {}
        for name, dimension in self.space.dimensions.items():
            rows = (len(keep[dimension.per]),) if dimension.per is not None else ()
            whole = np.broadcast_to(np.arange(dimension.size), (*rows, dimension.size))
            keep[name] = _checked(dimension, np.asarray(self.keep.get(name, whole)), rows)
            if dimension.ordered and not np.array_equal(keep[name], np.arange(len(keep[name]))):
                raise InputError(
                    f"the plan keeps other units of {name} than its first; it is rotated, so that they are in order"
                )
            if dimension.fixed and rows != (0,) and keep[name].shape != whole.shape:
                raise InputError(f"the plan prunes {name}, but it must stay whole: statistics are taken over it")
        object.__setattr__(self, "keep", keep)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every dimension after slicing."""
        return {name: kept.shape[-1] for name, kept in self.keep.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DimensionPlan":
        """A plan never changes, so copies of a model share it."""
        return self

    def then(self, later: "DimensionPlan") -> "DimensionPlan":
        """The plan on the dense model that does this plan and then ``later``, a plan on the sliced model."""
        # One of them may know the channels of a detector's neck and heads, and the other may not.
        left, given = self.sizes, later.space.sizes
        known = {n for n, d in {**self.space.dimensions, **later.space.dimensions}.items() if d.kind != "channels"}
        if any(left.get(n) != given.get(n) for n in known | (left.keys() & given.keys())):
            raise InputError("the second plan is for a model of other sizes than the first plan leaves")
        keep: dict[str, Array] = {n: later.keep[n] for n in later.keep if n not in self.keep}
        for name, kept in self.keep.items():
            if name not in later.keep:
                keep[name] = kept
                continue
            parent, chosen = self.space.dimensions[name].per, later.keep[name]
            rows = kept if parent is None else kept[later.keep[parent]]
            keep[name] = rows[chosen] if parent is None else np.take_along_axis(rows, chosen, axis=1)
        return DimensionPlan(self.space.joined(later.space), keep)

    def after(self, earlier: "DimensionPlan", space: DimensionSpace) -> "DimensionPlan":
        """What is left of this plan once an earlier one is done: the plan on the sliced model of which
        ``earlier.then(it)`` is this plan.

        Args:
            earlier: a plan on the same dense model that keeps what this one keeps.
            space: that of the model that it leaves.

        Raises:
            InputError: the earlier plan does not keep all that this one keeps.
        """
        keep: dict[str, Array] = {}
        for name, wanted in self.keep.items():
            parent, there = self.space.dimensions[name].per, earlier.keep[name]
            if parent is None:
                wanted, there = wanted[None], there[None]
            else:
                there = there[keep[parent]]
            found = [np.searchsorted(row, kept) for row, kept in zip(there, wanted, strict=True)]
            for row, kept, at in zip(there, wanted, found, strict=True):
                if not np.array_equal(row[np.minimum(at, len(row) - 1)] if len(row) else row, kept):
                    raise InputError(f"the plan keeps units of {name} that the model it is for has no longer")
            keep[name] = found[0] if parent is None else np.array(found).reshape(wanted.shape)
        return DimensionPlan(space, keep)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        channels = [d.name for d in self.space.dimensions.values() if d.kind == "channels"]
        return {
            "format": _FORMAT,
            "model": self.space.model,
            "dense": self.space.sizes,
            "keep": {name: kept.tolist() for name, kept in self.keep.items()},
            **({"channels": channels} if channels else {}),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, in one step."""
        write_json(Path(path), self.to_json())


def _known(space: DimensionSpace) -> str:
    return f"its dimensions are {', '.join(list(space.dimensions)[:6])}, ..."


def _checked(dimension: Dimension, kept: Array, rows: tuple[int, ...]) -> Array:
    size = dimension.size
    where = f"the plan's {dimension.name} (size {size})"
    if rows == (0,) and kept.shape[:1] == (0,):  # JSON has no width for no rows
        return np.zeros((0, 1), dtype=np.int64)
    if kept.ndim != len(rows) + 1 or kept.shape[:-1] != rows:
        expected = f"{rows[0]} lists, one for each kept unit of its parent" if rows else "one list of indices"
        raise InputError(f"{where} has shape {list(kept.shape)}, expected {expected}, all of one length")
    if kept.shape[-1] == 0 and dimension.kind not in VANISHING:
        raise InputError(f"{where} keeps no unit; keep at least one: only {' and '.join(VANISHING)} may go to none")
    if kept.size == 0:
        return kept.astype(np.int64)
    if not np.issubdtype(kept.dtype, np.integer):
        raise InputError(f"{where} must hold whole numbers, got {kept.dtype}")
    kept = np.sort(kept.astype(np.int64), axis=-1)
    if kept.min() < 0 or kept.max() >= size:
        seen = kept.min() if kept.min() < 0 else kept.max()
        raise InputError(f"{where} has the index {seen}, out of range 0..{size - 1}")
    repeated = kept[..., 1:] == kept[..., :-1]
    if repeated.any():
        raise InputError(f"{where} has the index {kept[..., 1:][repeated][0]} twice")
    return kept


def load_plan(path: str | Path, space: DimensionSpace, *, part: bool = False) -> DimensionPlan:
    """Read a plan for the model that ``space`` describes.

    Args:
        path: the file.
        space: the model's.
        part: whether the plan may be a detector's, of which this is the backbone: the channels of its neck and heads
            are then left out.

    Raises:
        InputError: the file is missing, damaged, not a plan, or made for a model of another class or sizes.
    """
    data = read_json(Path(path))
    return plan_from_json(_without_channels(data, space) if part else data, space, str(path))


def has_channels(path: str | Path) -> bool:
    """Whether a plan's file is of a detector with the channels of its neck and heads."""
    data = read_json(Path(path))
    return isinstance(data, dict) and bool(data.get("channels"))


def plan_from_json(data: Any, space: DimensionSpace, source: str = "the plan") -> DimensionPlan:
    """Check JSON values as a plan for ``space``; see :func:`load_plan`."""
    if not isinstance(data, dict) or data.get("format") != _FORMAT or not isinstance(data.get("keep"), dict):
        raise InputError(f"{source} is not a dimension plan (expected a JSON object with format {_FORMAT!r} and keep)")
    if data.get("model") != space.model or data.get("dense") != space.sizes:
        raise InputError(f"{source} was made for another model: {_difference(data, space)}")
    keep = {}
    for name, kept in data["keep"].items():
        try:
            keep[name] = np.array(kept)
        except ValueError:
            raise InputError(f"{source}: the kept indices of {name} are lists of different lengths") from None
    return DimensionPlan(space, keep)


def _without_channels(data: Any, space: DimensionSpace) -> Any:
    if not isinstance(data, dict) or not isinstance(channels := data.get("channels"), list):
        return data
    others = {name for name in channels if isinstance(name, str)} - set(space.dimensions)
    own = {key: part for key, part in data.items() if key in ("dense", "keep") and isinstance(part, dict)}
    return {**data, **{key: {n: v for n, v in part.items() if n not in others} for key, part in own.items()}}


def _difference(data: Mapping[str, Any], space: DimensionSpace) -> str:
    if data.get("model") != space.model:
        return f"it is for {data.get('model')!r}, this is {space.model!r}"
    dense = data.get("dense")
    dense = dense if isinstance(dense, dict) else {}
    for name in [*space.sizes, *dense]:
        if dense.get(name) != space.sizes.get(name):
            return f"its {name} has size {dense.get(name)}, this model's has {space.sizes.get(name)}"
    return "its dimensions differ"
