"""Dimensions by name and index, and the one line that says the axes of the same tensor in every block."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sidt.drafting.atoms import Atoms, Expr
from sidt.drafting.names import Names, Spot
from sidt.drafting.roles import Roles, common
from sidt.space.families import Kind


@dataclass(frozen=True)
class Named:
    """A dimension: its name, its index and what it is; ``whole`` if it has to stay so."""

    base: str
    index: tuple[int, ...]
    kind: Kind
    whole: bool
    per: str | None = None


@dataclass
class Naming:
    """The dimensions of the atoms, the heads of attentions that have only one, and the variables of each name.

    What must stay whole may have a name of its own in every block, so atoms of attentions go by their block too.
    """

    of: dict[tuple[int, str], Named]
    parent: dict[tuple[int, str], Named]
    variables: dict[str, tuple[str, ...]]

    def key(self, atom: int, block: str) -> tuple[int, str]:
        """Under which an atom stands, in a tensor of a block."""
        return (atom, block) if (atom, block) in self.of else (atom, "")


def name_all(roles: Roles, names: Names, atoms: Atoms) -> Naming:
    """Give each atom that has a kind its name and index."""
    naming = Naming({}, {}, {})
    taken: dict[str, tuple[str, str]] = {}

    def base_of(default: str, owner: str) -> str:
        """A base name for all dimensions that live in modules of one template."""
        leaf = re.sub(r"\W+", "_", re.sub(r"\.?\{[a-z]\}", "", owner)).strip("_").split("_")[-1] or "model"
        for name in (default, f"{default}_{leaf}", *(f"{default}_{leaf}{n}" for n in range(2, 99))):
            if taken.setdefault(name, (default, owner)) == (default, owner):
                return name
        raise AssertionError(default)

    widths = [a for a, kind in roles.kinds.items() if kind == "width"]
    _name_widths(widths, roles, names, naming, base_of)
    groups = [([a for a in (x.heads, x.qk, x.v) if a in roles.kinds], x) for x in roles.attentions]
    spots = [
        names.spot(common([n for a in own for n in roles.held[a] if names.spot(n).block == x.block]))
        for own, x in groups
    ]
    owners = Counter(spot.template for spot in spots)
    # The plain name is for what most blocks have.
    order = sorted(range(len(groups)), key=lambda g: -owners[spots[g].template])
    for g in order:
        (_, attention), owner = groups[g], spots[g]
        suffix = base_of("heads", owner.template)[len("heads") :]
        naming.variables |= {f"{kind}{suffix}": owner.variables for kind in ("heads", "qk", "v")}
        whole = attention.heads is not None and attention.heads in roles.stays
        heads = Named(f"heads{suffix}", owner.indices, "heads", whole)
        if attention.heads is not None:
            naming.of[attention.heads, attention.block] = heads
        children: tuple[tuple[Kind, int], ...] = (("qk", attention.qk), ("v", attention.v))
        for kind, atom in children:
            stays = atom in roles.stays
            name = f"{kind}{suffix}"
            naming.of[atom, attention.block] = Named(name, owner.indices, kind, stays, heads.base)
            if attention.heads is None:
                naming.parent[atom, attention.block] = heads
    _name_hidden(roles, names, naming, base_of)
    return naming


def _name_hidden(roles: Roles, names: Names, naming: Naming, base_of: Callable[[str, str], str]) -> None:
    hidden = [a for a, kind in roles.kinds.items() if kind == "mlp"]
    spots = {a: names.spot(common(roles.held[a])) for a in hidden}
    seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
    keys = {}
    for a in hidden:
        at = (spots[a].template, spots[a].indices)
        keys[a] = f"{spots[a].template}" + (f".{seen[at] + 1}" if seen[at] else "")
        seen[at] += 1
    counts = Counter(keys.values())
    for a in sorted(hidden, key=lambda a: (not re.search(r"mlp|ffn", keys[a]), -counts[keys[a]])):
        base = base_of("hidden", keys[a])
        naming.variables[base] = spots[a].variables
        naming.of[a, ""] = Named(base, spots[a].indices, "mlp", a in roles.stays)


def _name_widths(
    widths: list[int], roles: Roles, names: Names, naming: Naming, base_of: Callable[[str, str], str]
) -> None:
    """A width that is the stream of one stage has its index; that of all blocks has none."""
    most: dict[str, dict[int, Counter[int]]] = {}
    for width in widths:
        for spot in (names.spot(n) for n in roles.held[width]):
            if spot.indices:
                first = spot.template.split(".{")[0]
                most.setdefault(first, {}).setdefault(spot.indices[0], Counter())[width] += 1
    home: dict[int, tuple[int, ...]] = {}
    stages = max(most.values(), key=lambda m: sum(c.total() for c in m.values()), default={})
    main = {s: counter.most_common(1)[0][0] for s, counter in sorted(stages.items())}
    streams = list(dict.fromkeys(main.values()))
    if len(streams) > 1:
        one_each = len(streams) == len(main)
        home = {w: (next(s for s, m in main.items() if m == w) if one_each else k,) for k, w in enumerate(streams)}
    elif not streams and widths:
        streams = widths[:1]
    variable = (names.first_variable,)
    for width in sorted(widths, key=lambda w: w not in streams):
        if width in streams:
            base = base_of("embed", "")
            naming.variables[base] = variable if home else ()
            naming.of[width, ""] = Named(base, home.get(width, ()), "width", width in roles.stays)
        else:
            base = base_of("width", f"{roles.held[width][0].split('.')[0]}{width}")
            naming.variables[base] = ()
            naming.of[width, ""] = Named(base, (), "width", width in roles.stays)


# --- lines -----------------------------------------------------------------------------------------------------------

Factor = Named | int
Words = tuple[tuple[Factor, ...], ...]  # an axis


def words_of(axis: Expr, block: str, naming: Naming, atoms: Atoms) -> Words:
    """An axis in names and numbers; of none at all, ``()``."""
    found = []
    for term in axis:
        factors: list[Factor] = []
        for at, atom in enumerate(term):
            key = naming.key(atom, block)
            named = naming.of.get(key)
            behind = {n.base for a in term[at + 1 :] if (n := naming.of.get(naming.key(a, block))) is not None}
            if named is not None and named.per in behind:
                named = None  # the notation has heads before what is theirs; this stays whole
            if named is not None and key in naming.parent and naming.parent[key] not in factors:
                factors.append(naming.parent[key])
            if named is not None:
                factors.append(named)
            elif factors and isinstance(factors[-1], int):
                factors[-1] *= atoms.size(atom)
            else:
                factors.append(atoms.size(atom))
        found.append(tuple(factors) or (1,))
    if not any(isinstance(f, Named) for term in found for f in term):
        return ()
    return tuple(found)


def line_of(
    spots: Sequence[Spot], axes: Sequence[Sequence[Words]], naming: Naming, attribute: bool = False
) -> str | None:
    """The one line that says the axes of all tensors of a template; ``None`` if they differ."""
    rank = {len(a) for a in axes}
    if len(rank) != 1:
        return None
    said = [_axis(spots, [a[d] for a in axes], naming, attribute) for d in range(rank.pop())]
    return None if None in said else ", ".join(filter(None, said))


def _axis(spots: Sequence[Spot], words: Sequence[Words], naming: Naming, attribute: bool) -> str | None:
    if not any(words):
        return "_"
    shapes = {tuple(tuple(f.base if isinstance(f, Named) else f for f in term) for term in w) for w in words if w}
    if len(shapes) != 1:
        return None
    there = [(spot, w) for spot, w in zip(spots, words, strict=True) if w]
    absent = [spot for spot, w in zip(spots, words, strict=True) if not w]
    terms = []
    for t, term in enumerate(there[0][1]):
        factors = []
        for f, factor in enumerate(term):
            if isinstance(factor, int):
                factors.append(str(factor))
                continue
            said = _index([(spot, w[t][f]) for spot, w in there], absent, naming)  # type: ignore[misc]
            if said is None:
                return None
            whole = any(w[t][f].whole for _, w in there)  # type: ignore[union-attr]
            factors.append(f"{factor.base}{said}{'!' if whole else ''}")
        alone = [x for x in term if isinstance(x, Named)]
        if (
            not attribute
            and alone
            and alone[0].per
            and not any(isinstance(x, Named) and x.base == alone[0].per for x in term)
        ):
            factors.insert(0, f"{alone[0].per}?")
        terms.append(" ".join(factors))
    return " + ".join(terms)


def _index(pairs: Sequence[tuple[Spot, Named]], absent: Sequence[Spot], naming: Naming) -> str | None:
    """How a line says which instance of a dimension it means, in every block alike."""
    base = pairs[0][1].base
    wanted = naming.variables[base]
    said = []
    for at, variable in enumerate(wanted):
        own = [s.indices[s.variables.index(variable)] if variable in s.variables else None for s, _ in pairs]
        targets = [n.index[at] for _, n in pairs]
        offsets = {t - o if o is not None else None for t, o in zip(targets, own, strict=True)}
        offset = offsets.pop() if len(offsets) == 1 else None
        if offset is not None:
            outside = [s.indices[s.variables.index(variable)] + offset for s in absent]
            if any(o >= 0 for o in outside):
                return None
            said.append(f"{{{variable}{offset:+d}}}" if offset else f"{{{variable}}}")
        elif len(set(targets)) == 1 and not absent:
            said.append(f"{{{targets[0]}}}")
        else:
            return None
    if not said and absent:
        return None
    bare = [f"{{{v}}}" for v in wanted] == said
    return "" if bare else "." + ".".join(said)


def lines_of(roles: Roles, names: Names, naming: Naming, atoms: Atoms, buffers: Mapping[str, object]) -> dict[str, str]:
    """A line for every tensor: one for all blocks where they are alike, else one for each."""
    by_template: dict[str, list[str]] = {}
    for name in roles.places:
        by_template.setdefault(names.spot(name).template, []).append(name)
    found = {}
    for template, members in by_template.items():
        spots = [names.spot(n) for n in members]
        axes = [[words_of(a, names.spot(n).block, naming, atoms) for a in roles.places[n]] for n in members]
        if all(n in buffers for n in members) and not any(w for a in axes for w in a):
            continue
        line = line_of(spots, axes, naming)
        if line is not None:
            found[template] = line or "_"
            continue
        for name, words in zip(members, axes, strict=True):
            found[name] = line_of([Spot(name, ())], [words], naming) or "_"
    return found
