"""What each atom is: heads, q/k or v of an attention, a width that several blocks see, or hidden units of one."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sidt.drafting.atoms import Atoms, Expr
from sidt.drafting.graph import Forward
from sidt.drafting.names import Names
from sidt.space.families import Kind


@dataclass
class Attention:
    """The atoms of one attention; heads are ``None`` where there is only one.

    What must stay whole may be the same atom in several blocks, as where rotary positions meet it.
    """

    owner: str
    heads: int | None
    qk: int
    v: int
    block: str = ""


@dataclass
class Roles:
    """What was found.

    Attributes:
        kinds: by atom; one that is in neither ``kinds`` nor frozen does not occur.
        attentions: those that the notation has words for.
        places: for each tensor and axis, its products of atoms.
        held: by atom, the names of the tensors that it is in.
        stays: frozen atoms that get a name all the same, and why they are.
        frozen: why tensors of the model stay whole, with the first tensor of each.
    """

    kinds: dict[int, Kind] = field(default_factory=dict)
    attentions: list[Attention] = field(default_factory=list)
    places: dict[str, tuple[Expr, ...]] = field(default_factory=dict)
    held: dict[int, list[str]] = field(default_factory=dict)
    stays: dict[int, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)


def common(names: Sequence[str]) -> str:
    """The longest path that some names begin with."""
    shared = []
    for parts in zip(*(n.split(".") for n in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def roles_of(
    forward: Forward,
    names: Names,
    takes: Callable[[str], str | None],
    buffers: Collection[str],
    *,
    attentions: bool = True,
    widths: bool = True,
) -> Roles:
    """Say what each atom of a forward is.

    Args:
        forward: what it showed; atoms are joined and frozen further.
        names: of the model.
        takes: says of the module of an attention why its sizes stay whole; ``None`` if they need not.
        buffers: the names of the tensors that are no parameters.
        attentions: whether heads, q/k and v are named; else they are frozen.
        widths: whether widths may lose units.
    """
    atoms, roles = forward.atoms, Roles()
    _settle(forward)
    roles.places = {n: tuple(atoms.resolve(a) for a in axes) for n, axes in forward.tensors.items()}
    roles.attentions = _attentions(forward, names)
    _settle(forward)
    roles.places = {n: tuple(atoms.resolve(a) for a in axes) for n, axes in forward.tensors.items()}
    for name, axes in roles.places.items():
        for atom in {a for axis in axes for term in axis for a in term}:
            roles.held.setdefault(atom, []).append(name)
    blocks = {a: {names.spot(n).block for n in held} for a, held in roles.held.items()}
    inner: dict[int, Kind] = {}
    valid = []
    for attention in roles.attentions:
        attention.heads = None if attention.heads is None else atoms.find(attention.heads)
        attention.qk, attention.v = atoms.find(attention.qk), atoms.find(attention.v)
        own = [a for a in (attention.heads, attention.qk, attention.v) if a is not None]
        shared = {a for a in (attention.qk, attention.v) if attention.heads is not None and atoms.is_frozen(a)}
        fits = len(set(own)) == len(own) and not any(a in inner for a in own if a not in shared)
        first = blocks.get(own[0], set())
        fits = (
            fits
            and len(first) == 1
            and all(blocks.get(a) == first or (a in shared and first <= blocks.get(a, set())) for a in own)
        )
        if attentions and fits:
            attention.block = next(iter(first))
            valid.append(attention)
            inner |= {attention.qk: "qk", attention.v: "v"}
            inner |= {} if attention.heads is None else {attention.heads: "heads"}
        else:
            for atom in own:
                if len(blocks.get(atom, ())) <= 1:
                    why = "it shares its axes in a way that no file can say" if attentions else "left whole"
                    atoms.freeze(((atom,),), f"{attention.owner}: {why}")
    roles.attentions = valid
    for attention in valid:
        own = [a for a in (attention.heads, attention.qk, attention.v) if a is not None]
        holding = own[:1] if attention.heads is not None else own
        if (reason := takes(common([n for a in holding for n in roles.held[a]]))) is not None:
            for atom in own:
                atoms.freeze(((atom,),), reason)
    _freeze_lonely(atoms, roles, inner)
    of_blocks = {a for a, held in roles.held.items() if any(names.spot(n).indices for n in held)}
    normed = {a for expr, _ in forward.statistics for term in atoms.resolve(expr) for a in term}
    for atom in roles.held:
        if atom in atoms.image:
            continue
        of_several = len(blocks[atom]) > 1 and (atom in of_blocks or atom in normed)
        kind: Kind = inner.get(atom, "width" if of_several else "mlp")
        if atom in inner or len([n for n, _ in _axes(roles, atom) if n not in buffers]) > 1:
            roles.kinds[atom] = kind
        else:
            atoms.freeze(((atom,),), "nothing else has it")
    _freeze_by_kind(forward, roles, of_blocks)
    for atom in (a for a, kind in roles.kinds.items() if kind == "width" and not widths and not atoms.is_frozen(a)):
        roles.stays[atom] = "left whole"
    for atom in list(roles.kinds):
        if atoms.is_frozen(atom):
            reason = _reason(atoms, atom)
            if reason not in _SILENT:
                said = re.sub(r"[\w.]*\.\d+\b[\w.]*", lambda m: names.spot(m.group()).template, reason)
                roles.frozen.setdefault(said, names.spot(roles.held[atom][0]).template)
            if atom in inner:
                roles.stays[atom] = reason
            else:
                del roles.kinds[atom]
    return roles


_SILENT = {"it is of the image", "nothing else has it", "it goes out of the model", "it is a position"}


def _reason(atoms: Atoms, atom: int) -> str:
    return next((atoms.reasons[a] for a in (atom, *atoms.leaves(((atom,),))) if a in atoms.reasons), "")


def _settle(forward: Forward) -> None:
    """Join what each part of a first factor has of its own with what all have, where a tensor has just one of it."""
    atoms = forward.atoms
    while True:
        used = {a for axes in forward.tensors.values() for x in axes for term in atoms.resolve(x) for a in term}
        shared = [
            (key[2], c)
            for key, c in atoms.copies.items()
            if atoms.find(key[2]) in used and atoms.find(c) != atoms.find(key[2])
        ]
        if not shared:
            return
        for atom, copy in shared:
            atoms.union(atom, copy)


def _attentions(forward: Forward, names: Names) -> list[Attention]:
    """The attentions by the modules that multiply; where a module's products are others, they are frozen."""
    atoms = forward.atoms
    by_owner: dict[str, tuple[list[int], list[int], list[int]]] = {}
    for product in forward.products:
        heads, qk, v = by_owner.setdefault(product.owner, ([], [], []))
        own = [a for e in product.batch for a in atoms.factors(e) if not _of_image(atoms, a)]
        contracted = [a for a in atoms.factors(product.contracted) if not _of_image(atoms, a)]
        left = [a for e in product.left for a in atoms.factors(e) if not _of_image(atoms, a)]
        heads += own
        qk += contracted
        v += left
    found = []
    for owner, (heads, qk, v) in by_owner.items():
        for a, b in pairwise(heads):
            if atoms.size(a) == atoms.size(b):
                atoms.union(a, b)
        one = [list(dict.fromkeys(map(atoms.find, group))) for group in (heads, qk, v)]
        one[2] = [a for a in one[2] if a not in one[1]] or one[2]
        if len(one[0]) <= 1 and len(one[1]) == 1 and len(one[2]) == 1:
            found.append(Attention(owner, one[0][0] if one[0] else None, one[1][0], one[2][0]))
        else:
            for atom in (a for group in one for a in group):
                if len({names.spot(n).block for n, x in forward.tensors.items() if _has(atoms, x, atom)}) <= 1:
                    atoms.freeze(((atom,),), f"{owner}: its products are not one of q with k and one with v")
    return found


def _of_image(atoms: Atoms, atom: int) -> bool:
    return atoms.of_image(((atom,),))


def _has(atoms: Atoms, axes: tuple[Expr, ...], atom: int) -> bool:
    return any(atom in term for axis in axes for term in atoms.resolve(axis))


def _axes(roles: Roles, atom: int) -> list[tuple[str, int]]:
    """The tensors and axes that an atom is in."""
    return [
        (name, d)
        for name in roles.held[atom]
        for d, axis in enumerate(roles.places[name])
        if any(atom in term for term in axis)
    ]


def _freeze_lonely(atoms: Atoms, roles: Roles, inner: dict[int, Kind]) -> None:
    """Freeze q/k and v where a tensor has them without their heads, and what is cut inside a product."""
    parent = {a: x.heads for x in roles.attentions for a in (x.qk, x.v)}
    for name, axes in roles.places.items():
        for term in (term for axis in axes for term in axis):
            for at, atom in enumerate(term):
                if parent.get(atom) is not None and parent[atom] not in term[:at]:
                    atoms.freeze(((atom,),), f"{name}: all heads share it")
                if len(list(atoms.leaves(((atom,),)))) > 1 and not atoms.is_frozen(atom):
                    atoms.freeze(((atom,),), f"{name}: a concatenation inside a product, which no file can say")
                if term.count(atom) > 1 and inner.get(atom) is None:
                    atoms.freeze(((atom,),), f"{name}: it is twice in one product")


def _freeze_by_kind(forward: Forward, roles: Roles, of_blocks: set[int]) -> None:
    """Freeze inner units that statistics are taken over, and those that go out of the model and are of no block."""
    atoms = forward.atoms

    def freeze(expr: Expr, reason: str, spared: tuple[Kind, ...]) -> None:
        for atom in {a for term in atoms.resolve(expr) for a in term} | set(atoms.factors(expr)):
            if atom in roles.kinds and roles.kinds[atom] not in spared:
                atoms.freeze(((atom,),), reason)

    for expr, where in forward.statistics:
        freeze(expr, f"{where}: statistics are taken over it", ("width",))
    for expr, where in forward.sums:
        freeze(expr, f"{where}: its entries are added", ("width", "qk"))
    for expr in forward.outputs:
        for atom in (a for term in atoms.resolve(expr) for a in term):
            if roles.kinds.get(atom) != "width" or atom not in of_blocks:
                freeze(((atom,),), "it goes out of the model", ())
