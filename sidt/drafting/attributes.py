"""Attributes of modules that repeat a size: the lines of the section ``attributes``."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sidt.drafting.names import Names, Spot
from sidt.drafting.roles import Roles
from sidt.drafting.templates import Named, Naming, Words, line_of

_SIZES = ("dim", "size", "chan", "width", "features", "num_chs")  # words of what is no number of heads


def attribute_lines(
    model: nn.Module, roles: Roles, names: Names, naming: Naming, sizes: Mapping[int, int]
) -> tuple[dict[str, str], list[str]]:
    """The lines of attributes, and those that may be of another dimension of the same size.

    Args:
        model: the model.
        roles: what its atoms are.
        names: of its modules.
        naming: of its dimensions.
        sizes: of its atoms.
    """
    found: dict[str, list[tuple[Spot, Words | None]]] = {}
    unsure: dict[str, str] = {}
    for name, module in model.named_modules():
        own = _dimensions(name, roles, naming)
        for leaf, value in _numbers(module):
            words, others = _said(leaf, value, own, sizes, top=not name)
            spot = names.spot(name)
            template = f"{spot.template}.{leaf}".lstrip(".")
            found.setdefault(template, []).append((Spot(template, spot.indices), words))
            if words is not None and others:
                unsure[template] = f"{template} = {value} may also be {', '.join(others)}"
    lines = {}
    for template, members in found.items():
        there = [(spot, words) for spot, words in members if words is not None]
        line = (
            line_of([s for s, _ in there], [[w] for _, w in there], naming, True)
            if len(there) == len(members)
            else None
        )
        if line is not None:
            lines[template] = line
        else:
            for spot, words in there:
                if (alone := line_of([Spot(spot.literal(template), ())], [[words]], naming, True)) is not None:
                    lines[spot.literal(template)] = alone
    return lines, list(unsure.values())


def _dimensions(name: str, roles: Roles, naming: Naming) -> dict[Named, int | None]:
    """The dimensions in a module's tensors, each with its atom; the heads of an attention of one head have none."""
    held: dict[Named, int | None] = {}
    for (atom, block), named in naming.of.items():
        inside = (t for t in roles.held[atom] if not block or t.startswith(f"{block}."))
        if not name or any(tensor.startswith(f"{name}.") for tensor in inside):
            held[named] = atom
            if (atom, block) in naming.parent:
                held.setdefault(naming.parent[atom, block], None)
    return held


def _numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """A module's attributes that are numbers, but for those of torch's layers that slices follow by themselves."""
    if isinstance(module, nn.Linear | nn.Conv2d) or hasattr(module, "normalized_shape"):
        return
    for leaf, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 0 and not leaf.startswith("_"):
            yield leaf, value


def _said(
    leaf: str, value: int, own: Mapping[Named, int | None], sizes: Mapping[int, int], top: bool
) -> tuple[Any, list[str]]:
    """The axis that a number repeats, and the names of others of the same size; ``None`` if it repeats none."""
    size = {d: 1 if atom is None else sizes[atom] for d, atom in own.items()}
    by_kind = {kind: [d for d in own if d.kind == kind] for kind in ("heads", "qk", "v", "width", "mlp")}
    singular = not top and len(by_kind["heads"]) == 1
    sized = any(word in leaf for word in _SIZES) or leaf == "d"
    of_heads = "head" in leaf and "hidden" not in leaf
    if singular and of_heads and not (leaf.startswith(("total", "all")) or "attn" in leaf):
        wanted = by_kind["qk"] + by_kind["v"] if sized else by_kind["heads"]
        return next((((d,),) for d in wanted if size[d] == value), None), []
    if value == 1:
        return None, []
    hits: list[tuple[Named, ...]] = [(d,) for d in by_kind["width"] if size[d] == value]
    if singular:
        heads = by_kind["heads"][0]
        children = (d for d in by_kind["v"] + by_kind["qk"] if size[heads] * size[d] == value)
        inner = [(heads, d) for d in children][:1]
        hits = [*inner, *hits] if any(w in leaf for w in ("attn", "inner", "all", "kv", "dh")) else [*hits, *inner]
    if not top:
        hits += [(d,) for d in by_kind["mlp"] if size[d] == value]
    if not sized and not leaf.endswith(("embed", "hidden", "channels", "in", "out")):
        return None, []
    if not hits:
        return None, []
    return (hits[0],), [" ".join(d.base for d in hit) for hit in hits[1:]]
