"""Atoms: axes that are joined, split into factors and cut into parts."""

import pytest

from sidt.drafting.atoms import ONE, Atoms


@pytest.fixture
def atoms():
    return Atoms()


def test_one_unit_is_nothing(atoms):
    assert atoms.fresh(1) == ONE and atoms.extent(ONE) == 1


def test_a_product_is_found_in_another(atoms):
    whole, other = atoms.fresh(12), atoms.fresh(12)
    three, four = atoms.factor(whole, [3, 4], "why")
    assert atoms.unify(other, whole, "why")
    assert atoms.resolve(other) == (atoms.resolve(three)[0] + atoms.resolve(four)[0],)


def test_each_part_has_its_own_of_what_stands_behind(atoms):
    """qkv seen as 3, heads, size."""
    whole = atoms.fresh(24)
    three, heads, size = atoms.factor(whole, [3, 2, 4], "why")
    parts = [atoms.take(three, i, i + 1, [heads, size], "why") for i in range(3)]
    assert all(piece == ONE for piece, _ in parts)
    terms = atoms.resolve(whole)
    assert terms == tuple((atoms.find(h[0][0]), atoms.find(s[0][0])) for _, (h, s) in parts)
    assert len(set(terms)) == 3


def test_concatenations_are_cut_alike(atoms):
    one, other = atoms.fresh(10), atoms.fresh(4) + atoms.fresh(6)
    assert atoms.unify(one, other, "why")
    assert atoms.resolve(one) == atoms.resolve(other) and len(atoms.resolve(one)) == 2
    assert atoms.between(one, 4, 10, "why") == (atoms.resolve(one)[1],)


def test_what_does_not_fit_is_frozen(atoms):
    """4 times 6 beside a concatenation of 10 and 14: no boundary between whole products."""
    four, six = atoms.fresh(4), atoms.fresh(6)
    product, parts = atoms.merge([four, six], "why"), atoms.fresh(10) + atoms.fresh(14)
    assert not atoms.unify(product, parts, "they do not fit")
    assert all(map(atoms.is_frozen, atoms.leaves(product + parts)))
    assert set(atoms.reasons.values()) == {"they do not fit"}


def test_a_concatenation_inside_a_product_is_frozen(atoms):
    heads, both = atoms.fresh(3), atoms.fresh(2) + atoms.fresh(5)
    merged = atoms.merge([heads, both], "no words for it")
    assert atoms.extent(merged) == 21 and all(map(atoms.is_frozen, atoms.leaves(merged)))


def test_freezing_reaches_what_was_joined(atoms):
    one, other = atoms.fresh(5), atoms.fresh(5)
    atoms.freeze(one, "it is looked up")
    atoms.unify(one, other, "why")
    assert atoms.is_frozen(other[0][0]) and not atoms.of_image(other)
