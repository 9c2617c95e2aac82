"""Binding the lines of a search-space file to one model: names, indices and stages become dimensions."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sidt.errors import InputError
from sidt.space import axes
from sidt.space.axes import Axis, Factor, ParsedAxis, ParsedLine
from sidt.space.families import Family, Kind, Line

# embed.{s-1} where s is 0: what the first stage reads is the image's, and never searched.
_BEFORE_THE_FIRST = ""


@dataclass
class Binder:
    """Turns the lines of a file into the axes of one model's tensors."""

    family: Family
    model: nn.Module
    begins: Mapping[str, tuple[str, list[int]]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    dimensions: dict[str, tuple[Kind, str | None, tuple[int, ...]]] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)

    def note_last(self, line: Line, variables: Mapping[str, int]) -> None:
        """Remember the highest index of each axis that a line uses with its own indices."""
        for factor in _factors(line):
            rule = self.family.rules.get(factor.name or "")
            if rule and rule.variables and factor.indices is None and set(rule.variables) <= set(variables):
                top = variables[rule.variables[0]]
                assert factor.name is not None
                self.last[factor.name] = max(top, self.last.get(factor.name, 0))

    def bind(
        self, parsed: ParsedLine, shape: tuple[int, ...], variables: Mapping[str, int], where: str
    ) -> tuple[Axis, ...]:
        """The axes of one tensor, in dimensions of the model; ``where`` is for messages."""
        bound = (
            axes.bind(self.paired(a), e, lambda f: self.resolve(f, variables, where))
            for a, e in zip(parsed, shape, strict=True)
        )
        return tuple(
            _as_given(axis, extent) if _BEFORE_THE_FIRST in axes.names(axis) else axis
            for axis, extent in zip(bound, shape, strict=True)
        )

    def paired(self, axis: ParsedAxis) -> ParsedAxis:
        """An axis in which two rows stand for each unit that is a pair of them in this model."""
        for name, paths in self.family.pairs.items():
            for present, halves in zip(paths[::2], paths[1::2], strict=True):
                if get_attribute(self.model, present) is not None:
                    halved = bool(get_attribute(self.model, halves))
                    axis = tuple(tuple(part for f in term for part in _pair(f, name, halved)) for term in axis)
                    break
        return axis

    def with_stages(self, variables: Mapping[str, int]) -> dict[str, int]:
        """The indices of a line, and the stages that they are in."""
        counted = {s: self.stage(s, variables[i]) for s, (i, _) in self.begins.items() if i in variables}
        return {**counted, **variables}

    def stage(self, variable: str, index: int) -> int:
        """The stage of a block; what stands before the first block is of its stage."""
        return sum(begin <= index for begin in self.begins[variable][1])

    def staged(self, variable: str, expression: str, index: int) -> int:
        """An index of an axis, which is a stage's where its expression counts blocks."""
        if variable in self.begins and expression.strip().startswith(self.begins[variable][0]):
            return self.stage(variable, index)
        return index

    def resolve(self, factor: Factor, variables: Mapping[str, int], where: str) -> str:
        """The dimension that a name of a line stands for; empty before the first block or stage."""
        assert factor.name is not None
        rule = self.family.rules.get(factor.name)
        if rule is None:
            raise InputError(f"{self.family.file.name}: {where} uses the axis {factor.name!r}, which is not declared")
        expressions = factor.indices if factor.indices is not None else rule.variables
        if len(expressions) != len(rule.variables):
            raise InputError(
                f"{self.family.file.name}: {where} gives {factor.name!r} {len(expressions)} indices, "
                f"not {len(rule.variables)}"
            )
        last = self.last.get(factor.name, 0)
        try:
            index = tuple(
                self.staged(variable, e, axes.evaluate_index(e, variables, last))
                for variable, e in zip(rule.variables, expressions, strict=True)
            )
        except InputError as error:
            raise InputError(f"{self.family.file.name}: {where}: {error}") from None
        if min(index, default=0) < 0:
            return _BEFORE_THE_FIRST
        name = ".".join([factor.name, *map(str, index)])
        parent = None if rule.per is None else ".".join([rule.per, *map(str, index)])
        self.dimensions[name] = (rule.kind, parent, index)
        if factor.fixed:
            self.fixed.add(name)
        return name


def _as_given(axis: Axis, extent: int) -> Axis:
    """An axis that what the model is given has: the tensor's own extent, if what it asks for by ``name?`` is there."""
    return ((*(s for term in axis for s in term if isinstance(s, axes.Present)), extent),)


def _pair(factor: Factor, name: str, halved: bool) -> tuple[Factor, ...]:
    """What stands for one factor where the axis of a name has pairs as its units."""
    if factor.name != name or factor.presence:
        return (factor,)
    return (Factor(number=2), factor) if halved else (factor, Factor(number=2))


def begins_of(family: Family, names: Collection[str]) -> dict[str, tuple[str, list[int]]]:
    """For each variable that counts blocks, the one that says which block, and those that begin a stage."""
    found = {}
    for variable, pattern in family.stages.items():
        (block,) = pattern.groupindex
        found[variable] = (block, sorted(int(m[block]) for name in names if (m := pattern.fullmatch(name))))
    return found


def _factors(line: Line) -> Iterator[Factor]:
    for alternative in line.alternatives:
        for axis in alternative:
            for term in axis:
                yield from term


def block_of(line: Line, match: re.Match[str], name: str) -> str:
    """The block a tensor belongs to: its name up to the last index, or its top-level module."""
    ends = [match.end(variable) for variable in line.pattern.groupindex]
    return name[: max(ends)] if ends else name.split(".")[0]


def get_attribute(root: Any, path: str) -> Any:
    """Follow a dotted path through attributes, list positions and keys; ``None`` where it does not exist."""
    for part in path.split("."):
        if isinstance(root, Mapping):
            root = root.get(part)
        elif part.isdigit() and not hasattr(root, part):
            root = root[int(part)] if hasattr(root, "__getitem__") and int(part) < len(root) else None
        else:
            root = getattr(root, part, None)
        if root is None:
            return None
    return root


def attribute_paths(
    line: Line, indices: list[dict[str, int]], model: nn.Module
) -> Iterator[tuple[str, dict[str, int]]]:
    """The paths that an attribute's template stands for in a model."""
    variables = tuple(line.pattern.groupindex)
    seen = {tuple(i[v] for v in variables): i for i in indices if set(variables) <= set(i)} if variables else {(): {}}
    for index in seen.values():
        path = line.template
        for variable in variables:
            path = path.replace(f"{{{variable}}}", str(index[variable]))
        if isinstance(get_attribute(model, path), int):
            yield path, {v: index[v] for v in variables}
