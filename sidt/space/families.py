"""Search-space files: one for each family of backbones, read but not yet bound to a model."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from sidt.errors import InputError
from sidt.files import load_yaml
from sidt.space import axes
from sidt.space.axes import ParsedLine

Kind = Literal["width", "heads", "qk", "v", "mlp", "channels"]
KINDS: tuple[Kind, ...] = get_args(Kind)
INNER_KINDS: tuple[Kind, ...] = ("heads", "qk", "v", "mlp", "channels")


@dataclass(frozen=True)
class Line:
    """One line: the template of a name, and the axes of the tensors that match it."""

    template: str
    text: str
    pattern: re.Pattern[str]
    alternatives: tuple[ParsedLine, ...]

    @property
    def in_order(self) -> bool:
        """Whether the first alternative that fits is meant, and not the only one."""
        return "||" in self.text


@dataclass(frozen=True)
class AxisRule:
    """What a declared axis is: its index variables, its kind, and the axis whose units each choose their own."""

    variables: tuple[str, ...]
    kind: Kind
    per: str | None


@dataclass(frozen=True)
class Family:
    """A search-space file.

    Attributes:
        file: where it is.
        models: the classes it is for.
        rules: the axes by name.
        parameters: the axes of the parameters.
        attributes: the axes of the attributes that repeat sizes.
        forwards: the module that has the attention forwards.
        norms: templates of the norms on a width, each with those of the layers that read it; nothing else in the model
            reads it. If none of them is there, it goes out.
        scales: templates of the scales on a width, each with that of the one layer whose output it scales.
        padded: templates of the norms between which and their readers zeros are put beside the tokens.
        tied: axes that the model's constructor makes of the heads and their size.
        whole: templates of modules that are never searched: what is in them needs no line, and stays as it is.
        pairs: axes whose units are pairs of rows in a model that has what is named first, as rotary positions: of a
            row in each half where the attribute named second is true (``qk`` is then ``2 qk``), else of neighbours
            (``qk 2``). Two names more are those of models that do not have the first.
        stages: index variables that count blocks of a flat list, each with the template of the tensor that begins a new
            one: ``s: blocks.{i}.proj.weight`` makes s of block i the number of these up to it.
        text: what is in the file, which checkpoints take along; empty of one that comes with SiDT.
    """

    file: Path
    models: tuple[str, ...]
    rules: Mapping[str, AxisRule]
    parameters: tuple[Line, ...]
    attributes: tuple[Line, ...]
    forwards: str
    norms: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, tuple[str, ...]]
    padded: tuple[str, ...]
    tied: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    pairs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stages: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    text: str = ""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What may be searched in some model: kinds of axes that a weight has without the mark of what stays whole."""
        weights = [own for line in self.parameters for own in line.alternatives if len(own) > 1]
        factors = [f for own in weights for axis in own for term in axis for f in term]
        names = {f.name for f in factors if not f.fixed and not f.presence}
        free = {rule.kind for name, rule in self.rules.items() if name in names}
        return tuple(kind for kind in KINDS if kind in free)

    def within(self, prefix: str) -> "Family":
        """The same of a model inside another, where the names of its modules begin with a prefix."""
        norms, scales = (
            {f"{prefix}{name}": tuple(f"{prefix}{other}" for other in others) for name, others in tree.items()}
            for tree in (self.norms, self.scales)
        )
        return replace(self, norms=norms, scales=scales, padded=tuple(f"{prefix}{name}" for name in self.padded))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _compile(template: str) -> re.Pattern[str]:
    """The pattern of the names that a template stands for.

    Raises:
        InputError: an index is in it twice.
    """
    indices = re.findall(r"\{([a-z])\}", template)
    if len(indices) > len(set(indices)):
        raise InputError(f"{template} has an index twice; write another letter")
    pattern = re.sub(r"\\\{([a-z])\\\}", r"(?P<\1>\\d+)", re.escape(template))
    return re.compile(pattern)


def _lines(tree: Mapping[str, Any], file: Path) -> tuple[Line, ...]:
    lines = []
    for key, text in _flatten(tree):
        try:
            lines.append(Line(key, text, _compile(key), axes.parse_line(text)))
        except InputError as error:
            raise InputError(f"{file}: {key}: {error}") from None
    return tuple(lines)


def _axis_rule(name: str, text: str, file: Path) -> tuple[str, AxisRule]:
    base, *variables = name.split(".")
    match = re.fullmatch(r"(?P<kind>\w+)(?:\s+per\s+(?P<per>\w+))?", text.strip())
    kinds = [kind for kind in KINDS if kind != "channels"]  # those are seen in a detector, and not written
    if match is None or match["kind"] not in kinds:
        raise InputError(f"{file}: axis {name} is {text!r}; write one of {', '.join(kinds)}, or '<kind> per <axis>'")
    return base, AxisRule(tuple(v.strip("{}") for v in variables), match["kind"], match["per"])


def read_family(file: Path) -> Family:
    """Read a search-space file.

    Raises:
        InputError: it cannot be read, is not YAML, or does not have the expected sections.
    """
    try:
        text = file.read_text(encoding="utf-8")
        tree = load_yaml(text)
    except OSError as error:
        raise InputError(f"cannot read the search space {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read the search space {file}: it is no text in UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"the search space {file} is not YAML: {' '.join(str(error).split())}") from None
    lists = ("padded", "tied", "whole")
    sections = {"models", "axes", "parameters"}
    more = {"attributes", "forwards", "norms", "scales", "pairs", "stages", *lists}
    if not isinstance(tree, Mapping) or not sections <= set(tree) <= sections | more:
        raise InputError(
            f"the search space {file} must have the sections models, axes, parameters (and attributes, forwards, "
            f"norms, scales, pairs, stages, {', '.join(lists)})"
        )
    shapes = {"models": list, "forwards": str} | dict.fromkeys(lists, list)
    kinds = {list: "a list", str: "the name of a module", dict: "a mapping"}
    for section, content in tree.items():
        shape = shapes.get(section, dict)
        if not isinstance(content, shape):
            raise InputError(f"the search space {file} has {section} {content!r}, which is not {kinds[shape]}")
    rules = dict(_axis_rule(str(name), str(text), file) for name, text in tree["axes"].items())
    attributes = _lines(tree.get("attributes", {}), file)
    if long := [line for line in attributes if any(len(own) != 1 for own in line.alternatives)]:
        raise InputError(f"{file}: {long[0].template}: an attribute is one number, and {long[0].text!r} has more axes")
    forwards = tree.get("forwards", "sidt.surgery.attention")
    norms, scales = (_followers(tree.get(section, {}), section, file) for section in ("norms", "scales"))
    parameters = _lines(tree["parameters"], file)
    padded, tied, whole = (tuple(map(str, tree.get(section, ()))) for section in lists)
    models = tuple(map(str, tree["models"]))
    pairs = _followers(tree.get("pairs", {}), "pairs", file)
    for name, paths in pairs.items():
        if name not in rules or rules[name].kind != "qk" or not paths or len(paths) % 2:
            raise InputError(
                f"{file}: pairs has {name}: {', '.join(paths)}; write an axis of kind qk, and what there is in models "
                f"where its units are pairs, and the attribute that is true where these are halves of a head"
            )
    begins = _followers(tree.get("stages", {}), "stages", file)
    stages = {name: _compile(", ".join(templates)) for name, templates in begins.items()}
    for name, pattern in stages.items():
        if len(pattern.groupindex) != 1:
            raise InputError(f"{file}: stages has {name}: {pattern.pattern}; write a tensor with one index, as {{i}}")
    return Family(
        *(file, models, rules, parameters, attributes, forwards, norms, scales, padded, tied, whole, pairs, stages),
        text,
    )


def _followers(tree: Mapping[str, Any], section: str, file: Path) -> dict[str, tuple[str, ...]]:
    """Names, each with those that it leads to, which have no indices but its own.

    Raises:
        InputError: they have, or a name cannot be read.
    """
    found = {}
    for key, text in _flatten(tree):
        found[key] = tuple(name.strip() for name in text.split(","))
        if "[" in text or (section in ("norms", "scales") and not _indices(text) <= _indices(key)):
            raise InputError(
                f"{file}: {section}: {key}: cannot read {text!r}; write names, separated by commas, with no indices "
                f"but those of {key}"
            )
        try:
            for name in (key, *found[key]):
                _compile(name)
        except InputError as error:
            raise InputError(f"{file}: {section}: {key}: {error}") from None
    return found


def _indices(template: str) -> set[str]:
    return set(re.findall(r"\{([^{}]*)\}", template))


def instances(templates: Mapping[str, tuple[str, ...]], name: str) -> tuple[str, ...] | None:
    """What the template that a name matches leads to, with the name's indices; ``None`` if it matches none."""
    for template, followers in templates.items():
        if match := _compile(template).fullmatch(name):
            return tuple(follower.format(**match.groupdict()) for follower in followers)
    return None


def stays_whole(family: Family, name: str) -> bool:
    """Whether a tensor is in a module that the family never searches."""
    return any(re.match(_compile(template).pattern + r"\.", name) for template in family.whole)


def match_line(family: Family, lines: tuple[Line, ...], name: str) -> tuple[Line, re.Match[str]] | None:
    """The one line whose template a name matches.

    Raises:
        InputError: several do.
    """
    found = [(line, match) for line in lines if (match := line.pattern.fullmatch(name))]
    if len(found) > 1:
        templates = ", ".join(line.template for line, _ in found)
        raise InputError(f"{family.file.name}: {name} matches {len(found)} lines: {templates}")
    return found[0] if found else None
