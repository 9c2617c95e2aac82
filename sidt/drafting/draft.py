"""Search-space files drafted from one exported forward of a model."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sidt.drafting.attributes import attribute_lines
from sidt.drafting.graph import exported, first_names, walk
from sidt.drafting.names import Names
from sidt.drafting.roles import roles_of
from sidt.drafting.rules import apply
from sidt.drafting.templates import Naming, lines_of, name_all
from sidt.errors import InputError
from sidt.space.finding import lineage
from sidt.space.trace import InputSize, input_size_of

ATTENTION = "sidt.surgery.attention"
_Attentions = Literal["sliced", "whole", "none"]
# Of heads, q/k and v: whether they may be sliced, have names or have none; whether widths may be; what stays whole.
_STEPS: tuple[tuple[_Attentions, bool, str], ...] = (
    ("sliced", True, ""),
    ("sliced", False, "the widths"),
    ("whole", True, "heads, q/k and v"),
    ("whole", False, "widths, heads, q/k and v"),
    ("none", False, "widths, heads, q/k and v, which have no name"),
)


@dataclass(frozen=True)
class Draft:
    """A drafted file.

    Attributes:
        text: the file.
        look: what a person must look at, a line each.
        left: what is left whole on purpose, in words; empty if nothing is.
    """

    text: str
    look: tuple[str, ...]
    left: str


def drafts(model: nn.Module, input_size: InputSize | None = None) -> Iterator[Draft]:
    """Drafts of the search-space file of a model's class, the boldest first.

    Each leaves more whole than the one before: widths, then heads with q/k and v too, which then have no name at all.

    Args:
        model: a model in eval mode that takes a batch of images; it is not changed.
        input_size: channels, height, width of an image; default: those that it is for.

    Raises:
        InputError: the model cannot be exported, or has a parameter that no line can be for.
    """
    scalars = [n for n, p in model.named_parameters() if not p.ndim]
    if scalars:
        raise InputError(f"{type(model).__name__}: {scalars[0]} has no axes, and a line gives at least one")
    program = exported(model, input_size or input_size_of(model))
    for attentions, widths, left in _STEPS:
        yield _draft(model, program, attentions, widths, left)


def _draft(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    attentions: _Attentions,
    widths: bool,
    left: str,
) -> Draft:
    forward, names, buffers = walk(program, apply, first_names(model)), Names(model), dict(model.named_buffers())
    known = _libraries()
    library = _best(known, model)

    def takes(owner: str) -> str | None:
        module = model.get_submodule(owner)
        if type(module) not in known[library]:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            return f"no attention forward takes pruned sizes for {kind}"
        return None if attentions == "sliced" else "heads, q/k and v are left whole"

    roles = roles_of(forward, names, takes, buffers, attentions=attentions != "none", widths=widths)
    naming = name_all(roles, names, forward.atoms)
    parameters = lines_of(roles, names, naming, forward.atoms, buffers)
    parameters |= _unused(model, names, roles.places)
    sizes = {atom: forward.atoms.size(atom) for atom, _ in naming.of}
    attributes, unsure = attribute_lines(model, roles, names, naming, sizes)
    look = [f"{reason} (first in {name})" for reason, name in roles.frozen.items()]
    look += [f"attributes: {line}" for line in unsure]
    return Draft(_text(lineage(model)[0], library, naming, parameters, attributes), tuple(look), left)


def _unused(model: nn.Module, names: Names, places: Mapping[str, object]) -> dict[str, str]:
    """Lines of the parameters that the forward does not use."""
    used = {names.spot(name).template for name in places}
    found = {}
    for name, parameter in model.named_parameters():
        if name not in places:
            template = names.spot(name).template
            found[name if template in used else template] = ", ".join("_" * parameter.ndim)
    return found


def _libraries() -> dict[str, set[type[nn.Module]]]:
    """The modules that have attention forwards, and for which classes."""
    folder = importlib.import_module("sidt.surgery.forwards")
    modules = [ATTENTION, *(f"{folder.__name__}.{m.name}" for m in pkgutil.iter_modules(folder.__path__))]
    return {name: set(getattr(importlib.import_module(name), "FORWARDS", {})) for name in modules}


def _best(known: Mapping[str, set[type[nn.Module]]], model: nn.Module) -> str:
    """The one that knows most of a model's modules."""
    return max(known, key=lambda name: sum(type(m) in known[name] for m in model.modules()))


# --- text ------------------------------------------------------------------------------------------------------------


def _text(
    model: str,
    library: str,
    naming: Naming,
    parameters: Mapping[str, str],
    attributes: Mapping[str, str],
) -> str:
    kinds = {}
    for named in (*naming.parent.values(), *naming.of.values()):
        name = ".".join([named.base, *(f"{{{v}}}" for v in naming.variables[named.base])])
        kinds[name] = f"{named.kind} per {named.per}" if named.per else named.kind
    lines = ["models:", f"  - {model}", ""]
    lines += [f"forwards: {library}", ""] if library != ATTENTION else []
    lines += ["axes:" if kinds else "axes: {}", *(f"  {name}: {kind}" for name, kind in kinds.items()), ""]
    lines += ["parameters:", *_tree(parameters)]
    if attributes:
        lines += ["", "attributes:", *_tree(attributes)]
    return "\n".join(lines) + "\n"


def _tree(lines: Mapping[str, str]) -> list[str]:
    """Lines under the blocks that they stand in."""
    found: list[str] = []
    open_: list[str] = []
    for template, text in _ordered(lines):
        *heads, leaf = _split(template)
        while open_ != heads[: len(open_)]:
            open_.pop()
        for head in heads[len(open_) :]:
            found.append(f"{'  ' * (len(open_) + 1)}{head}:")
            open_.append(head)
        found.append(f"{'  ' * (len(open_) + 1)}{leaf}: {text}")
    return found


def _split(template: str) -> list[str]:
    """A template at its variables: ``layers.{s}.blocks.{b}.x.y`` -> ``layers.{s}``, ``blocks.{b}``, ``x.y``."""
    parts: list[str] = [""]
    pieces = template.split(".")
    for at, piece in enumerate(pieces):
        parts[-1] = f"{parts[-1]}.{piece}".lstrip(".")
        if piece.startswith("{") and at + 1 < len(pieces) and not pieces[at + 1].startswith("{"):
            parts.append("")
    return parts


def _ordered(lines: Mapping[str, str]) -> list[tuple[str, str]]:
    """Lines with those of one block together, where its first stands: a key is in a mapping only once."""
    first: dict[tuple[str, ...], int] = {}
    for at, template in enumerate(lines):
        heads = _split(template)
        for depth in range(1, len(heads) + 1):
            first.setdefault(tuple(heads[:depth]), at)

    def rank(template: str) -> tuple[int, ...]:
        heads = _split(template)
        return tuple(first[tuple(heads[: d + 1])] for d in range(len(heads)))

    return sorted(lines.items(), key=lambda item: rank(item[0]))
