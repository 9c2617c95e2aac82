"""Axes as sums of products of atoms, which are joined, cut into parts and split into factors as operations show it.

An atom is a run of units that nothing has cut so far. Two axes that an operation reads side by side are made the same:
atoms are joined by union-find, and where one is a product or a concatenation, the other is found to be one too. What
cannot be said so is frozen: it stays whole.
"""

from collections.abc import Iterator, Sequence
from math import prod

Term = tuple[int, ...]  # a product of atoms, row-major; of none: 1
Expr = tuple[Term, ...]  # a concatenation of products
ONE: Expr = ((),)
_FEW = 16  # parts of a first factor


class Atoms:
    """All atoms of one model, and what is known of each.

    Attributes:
        reasons: why an atom is frozen, by its root.
        image: roots of atoms that are of the image (batch, channels, positions) and not of the model.
    """

    def __init__(self) -> None:
        """No atom."""
        self._parent: list[int] = []
        self._size: list[int] = []
        self._parts: dict[int, Expr] = {}  # what an atom was found to be made of
        self._followers: dict[int, tuple[int, ...]] = {}  # what stands behind the first factor of a product
        self.copies: dict[
            tuple[int, int, int], int
        ] = {}  # (first factor, which part of it, follower): its own follower
        self.reasons: dict[int, str] = {}
        self.image: set[int] = set()

    # --- one atom ----------------------------------------------------------------------------------------------------

    def fresh(self, size: int, reason: str | None = None, image: bool = False) -> Expr:
        """A new atom as an axis; of one unit it is nothing."""
        return ONE if size == 1 else ((self._new(size, reason, image),),)

    def _new(self, size: int, reason: str | None = None, image: bool = False) -> int:
        atom = len(self._parent)
        self._parent.append(atom)
        self._size.append(size)
        if reason is not None or image:
            self.reasons[atom] = reason or "it is of the image"
        if image:
            self.image.add(atom)
        return atom

    def find(self, atom: int) -> int:
        """The root of an atom's class."""
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def size(self, atom: int) -> int:
        """How many units an atom has."""
        return self._size[atom]

    def is_frozen(self, atom: int) -> bool:
        """Whether an atom, or all that it is made of, stays whole."""
        root = self.find(atom)
        if root in self.reasons:
            return True
        parts = self._parts.get(root)
        return parts is not None and all(self.is_frozen(a) for term in parts for a in term)

    def of_image(self, expr: Expr) -> bool:
        """Whether nothing of the model is in an axis."""
        return all(self.find(a) in self.image for term in self.resolve(expr) for a in term)

    def leaves(self, expr: Expr) -> Iterator[int]:
        """The atoms that nothing has cut, in an axis."""
        for term in expr:
            for atom in map(self.find, term):
                parts = self._parts.get(atom)
                if parts is None:
                    yield atom
                else:
                    yield from self.leaves(self.resolve(((atom,),)) if len(parts) > 1 else parts)

    def freeze(self, expr: Expr, reason: str, image: bool = False) -> None:
        """Keep everything in an axis whole."""
        for atom in list(self.leaves(expr)):
            self.reasons.setdefault(atom, reason)
            if image:
                self.image.add(atom)

    # --- normal form -------------------------------------------------------------------------------------------------

    def extent(self, expr: Expr) -> int:
        """The number of entries of an axis."""
        return sum(prod(self._size[a] for a in term) for term in expr)

    def resolve(self, expr: Expr) -> Expr:
        """An axis as the concatenation of products of roots; a concatenation inside a product stays one atom."""
        return tuple(t for term in expr for t in self._resolve(term))

    def factors(self, expr: Expr) -> Term:
        """The atoms of an axis of one product, concatenations not looked into; of several, all their atoms."""
        return tuple(a for term in expr for a in self._inline(term))

    def _inline(self, term: Term) -> Term:
        found: list[int] = []
        for atom in map(self.find, term):
            parts = self._parts.get(atom)
            found += [atom] if parts is None or len(parts) != 1 else self._inline(parts[0])
        return tuple(found)

    def _resolve(self, term: Term) -> list[Term]:
        term = self._inline(term)
        if not term or term[0] not in self._parts:
            return [term]
        first, rest = term[0], term[1:]
        return [t for i, part in enumerate(self._parts[first]) for t in self._resolve(part + self._own(first, i, rest))]

    def followers(self, atom: int) -> set[int]:
        """The atoms behind the first factor of a product, of which each of its parts has its own."""
        return set(self._inline(self._followers.get(self.find(atom), ())))

    def _own(self, first: int, part: int, term: Term) -> Term:
        behind = self.followers(first)
        return tuple(self.copy(first, part, a) if a in behind else a for a in term)

    def copy(self, first: int, part: int, atom: int) -> int:
        """A follower as one part of the first factor has it."""
        first, atom = self.find(first), self.find(atom)
        key = (first, part, atom)
        if key not in self.copies:
            self.copies[key] = self._new(self._size[atom], self.reasons.get(atom), atom in self.image)
        return self.copies[key]

    def take(self, expr: Expr, start: int, stop: int, others: Sequence[Expr], reason: str) -> tuple[Expr, list[Expr]]:
        """The units of an axis from ``start`` on and before ``stop``, and the axes beside it.

        Where the axis is the first factor of a product, each of its parts has its own of the factors behind it:
        ``qkv`` seen as ``3, heads, size`` is three products, and these need not be the same.
        """
        alone = self.factors(expr)
        first = alone[0] if len(expr) == 1 and len(alone) == 1 else None
        behind = set() if first is None else self.followers(first)
        if first is None or first in self.image or not any(a in behind for e in others for a in self.factors(e)):
            return self.between(expr, start, stop, reason), list(others)
        if (start, stop) == (0, self._size[first]):
            return expr, list(others)
        if first not in self._parts:
            self.cut(first, [n for n in (start, stop - start, self._size[first] - stop) if n])
        at, taken = 0, []
        for i, part in enumerate(self._parts[first]):
            if start <= at and at + self.extent((part,)) <= stop:
                taken.append(i)
            at += self.extent((part,))
        if sum(self.extent((self._parts[first][i],)) for i in taken) != stop - start:
            for e in (expr, *others):
                self.freeze(e, reason)
            return self.fresh(stop - start, reason), list(others)
        if len(taken) == 1:
            piece: Expr = (self._parts[first][taken[0]],)
            new = {a: self.copy(first, taken[0], a) for a in behind}
        else:  # several parts are a first factor again
            again = self._new(stop - start)
            self._parts[again] = tuple(self._parts[first][i] for i in taken)
            new = {a: self._new(self._size[a]) for a in behind}
            self._followers[again] = tuple(new.values())
            for j, i in enumerate(taken):
                self.copies |= {(again, j, new[a]): self.copy(first, i, a) for a in behind}
            piece = ((again,),)
        return piece, [tuple(tuple(new.get(a, a) for a in self._inline(term)) for term in e) for e in others]

    # --- splitting and cutting ---------------------------------------------------------------------------------------

    def split(self, atom: int, sizes: Sequence[int]) -> None:
        """Find that an atom is a product."""
        root = self.find(atom)
        factors = [self._new(s, self.reasons.get(root), root in self.image) for s in sizes if s > 1]
        self._parts[root] = (tuple(factors),)
        if root in self._followers:  # those of the whole are those of its first factor, which stands behind no other
            self._followers[factors[0]] = (*factors[1:], *self._followers.pop(root))
        else:
            self._followers[factors[0]] = tuple(factors[1:])

    def cut(self, atom: int, sizes: Sequence[int]) -> None:
        """Find that an atom is a concatenation."""
        root = self.find(atom)
        reason, image = self.reasons.get(root), root in self.image
        if self._followers.get(root) and self._size[root] <= _FEW:
            sizes = [1] * self._size[root]  # each may be taken by itself, and has its own of what stands behind
        self._parts[root] = tuple(self.fresh(s, reason, image)[0] for s in sizes)

    def factor(self, expr: Expr, sizes: Sequence[int], reason: str) -> list[Expr]:
        """An axis seen as a product of axes of some sizes."""
        if self.of_image(expr):
            return [self.fresh(s, image=True) for s in sizes]
        large = [s for s in sizes if s > 1]
        if len(large) <= 1:
            return [ONE if s == 1 else expr for s in sizes]
        terms = self.resolve(expr)
        found = [self.fresh(s) for s in sizes]
        whole = tuple(f[0][0] for f in found if f != ONE)
        if len(terms) > 1:
            rest = prod(large[1:])
            lengths = [self.extent((t,)) for t in terms]
            if any(length % rest for length in lengths):
                return self._lost(expr, sizes, reason)
            self._followers[whole[0]] = whole[1:]
            self.cut(whole[0], [length // rest for length in lengths])
        if not self.unify(expr, (whole,), reason):
            return self._lost(expr, sizes, reason)
        return found

    def _lost(self, expr: Expr, sizes: Sequence[int], reason: str) -> list[Expr]:
        self.freeze(expr, reason)
        return [self.fresh(s, reason) for s in sizes]

    def merge(self, exprs: Sequence[Expr], reason: str) -> Expr:
        """The product of axes."""
        exprs = [e for e in exprs if e != ONE]
        if not exprs:
            return ONE
        if all(self.of_image(e) for e in exprs):
            return self.fresh(prod(map(self.extent, exprs)), image=True)
        if len(exprs) > 1 and all(self.is_frozen(a) for e in exprs for a in self.leaves(e)):
            why = next(self.reasons[a] for e in exprs for a in self.leaves(e) if a not in self.image)
            return self.fresh(prod(map(self.extent, exprs)), why)
        first, *rest = exprs
        if any(len(e) > 1 for e in rest):
            for e in exprs:
                self.freeze(e, reason)
            return self.fresh(prod(map(self.extent, exprs)), reason)
        behind = tuple(a for e in rest for a in e[0])
        return tuple(term + behind for term in first)

    def between(self, expr: Expr, start: int, stop: int, reason: str) -> Expr:
        """The units of an axis from ``start`` on and before ``stop``."""
        if (start, stop) == (0, self.extent(expr)):
            return expr
        for at in (start, stop):
            if not self._cut_at(expr, at):
                self.freeze(expr, reason)
                return self.fresh(stop - start, reason, self.of_image(expr))
        found, offset = [], 0
        for term in self.resolve(expr):
            length = self.extent((term,))
            if start <= offset and offset + length <= stop:
                found.append(term)
            offset += length
        return tuple(found)

    def _cut_at(self, expr: Expr, at: int) -> bool:
        """Make a boundary between two products of an axis, if one may be there."""
        offset = 0
        for term in self.resolve(expr):
            length = self.extent((term,))
            if offset < at < offset + length:
                first, rest = term[0], prod(self._size[a] for a in term[1:])
                if (at - offset) % rest:
                    return False
                here = (at - offset) // rest
                self.cut(first, [here, self._size[first] - here])
                return True
            offset += length
        return True

    # --- joining -----------------------------------------------------------------------------------------------------

    def unify(self, one: Expr, other: Expr, reason: str) -> bool:
        """Make two axes of one length the same; where that cannot be, both are frozen, and ``False`` comes back."""
        if self._unify(one, other):
            return True
        for expr in (one, other):
            self.freeze(expr, reason, self.of_image(one) or self.of_image(other))
        return False

    def _unify(self, one: Expr, other: Expr) -> bool:
        one, other = self.resolve(one), self.resolve(other)
        if one == other:
            return True
        if self.extent(one) != self.extent(other):
            return False
        if len(one) == len(other) == 1:
            return self._unify_terms(list(one[0]), list(other[0]))
        for expr, cuts in ((one, other), (other, one)):
            at = 0
            for term in cuts:
                at += self.extent((term,))
                if not self._cut_at(expr, at):
                    return False
        one, other = self.resolve(one), self.resolve(other)
        return len(one) == len(other) and all(self._unify((a,), (b,)) for a, b in zip(one, other, strict=True))

    def _unify_terms(self, one: list[int], other: list[int]) -> bool:
        while one and other:
            a, b = self.find(one.pop(0)), self.find(other.pop(0))
            small, large = sorted((self._size[a], self._size[b]))
            if small == large:
                self.union(a, b)
                continue
            if large % small:
                return False
            big, queue = (a, one) if self._size[a] == large else (b, other)
            if big in self._parts:
                return False
            self.split(big, (small, large // small))
            first, *rest = self._inline((big,))
            queue[:0] = rest
            self.union(first, b if big == a else a)
        return not one and not other

    def union(self, a: int, b: int) -> None:
        """Make two atoms of one size the same."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        self._parent[b] = a
        if b in self.reasons or a in self.reasons:
            reason = self.reasons.pop(b, "") if a not in self.reasons else self.reasons[a]
            self.reasons.pop(b, None)
            self.reasons[a] = reason
        if b in self.image or a in self.image:
            self.image.discard(b)
            self.image.add(a)
        if behind := self._followers.pop(b, ()):
            self._followers.setdefault(a, behind)
        for key in [k for k in self.copies if b in (k[0], k[2])]:
            new = (a if key[0] == b else key[0], key[1], a if key[2] == b else key[2])
            copied = self.copies.pop(key)
            if new in self.copies:
                self.union(self.copies[new], copied)
            else:
                self.copies[new] = copied
        parts = self._parts.pop(b, None)
        if parts is not None:
            mine = self._parts.setdefault(a, parts)
            if mine is not parts and not self._unify(mine, parts):
                self.freeze(mine + parts, "two ways to cut it do not fit")
        if a in self.reasons and a in self._parts:
            self.freeze(self._parts[a], self.reasons[a], a in self.image)
