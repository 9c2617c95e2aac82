"""The axis notation against brute force: the same axis written out with numpy's reshape."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidt.space import axes
from sidt.space.axes import Factor, Part, Present

PER = {"u": "h"}  # h heads, each with u units of its own; w stands alone


def factor(name: str, *indices: str, fixed: bool = False) -> Factor:
    return Factor(name, indices=indices or None, fixed=fixed)


def test_parse_product_concatenation_and_unsearched_axes():
    (line,) = axes.parse_line("heads qk + heads v, 4 embed.{s-1}, _, hidden!")
    heads_qk, heads_v = (factor("heads"), factor("qk")), (factor("heads"), factor("v"))
    merged = (Factor(number=4), factor("embed", "s-1"))
    assert line == ((heads_qk, heads_v), (merged,), ((Factor(),),), ((factor("hidden", fixed=True),),))


def test_parse_alternatives_and_several_indices():
    first, second = axes.parse_line("hidden, a.{i}.{2} | hidden + hidden, _")
    assert first[1] == ((factor("a", "i", "2"),),)
    assert second == (((factor("hidden"),),) * 2, ((Factor(),),))
    (line,) = axes.parse_line("a.{s+1} + a.{s-1}")
    assert line == (((factor("a", "s+1"),), (factor("a", "s-1"),)),)


def test_parse_a_sum_inside_a_product():
    (line,) = axes.parse_line("2 heads (qk + v.{s+1}) + embed, heads(qk)")
    outer = (Factor(number=2), factor("heads"))
    assert line[0] == ((*outer, factor("qk")), (*outer, factor("v", "s+1")), (factor("embed"),))
    assert [(type(t), getattr(t, "shared", 0), getattr(t, "first", None)) for t in line[0]] == [
        (Part, 2, True),
        (Part, 2, False),
        (tuple, 0, None),
    ]
    bound = axes.bind(line[0], 7, lambda f: f"{f.name}.0")
    assert bound == ((2, "heads.0", "qk.0"), (2, "heads.0", "v.0"), ("embed.0",))
    for same in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert same == bound and [t.first for t in same[:2]] == [True, False] and same[1].shared == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("h (a + )", ["empty axis or term", "'h (a + )'"]),
        ("(a + b)", ["'(a'"]),
        ("h (a + b) c", ["'(a'"]),
        ("h (a + g (b + c))", ["'(a'"]),
        ("h (a + b", ["'(a'"]),
        ("", ["empty axis", "''"]),
        ("embed,", ["empty axis", "'embed,'"]),
        ("a + , b", ["empty axis", "'a + , b'"]),
        ("a | ", ["empty axis", "'a | '"]),
        ("a _", ["_ must stand alone", "'a _'"]),
        ("_ + _", ["_ must stand alone", "'_ + _'"]),
        ("a*b", ["'a*b'", "a name, a number or _"]),
        ("a.{}", ["'a.{}'"]),
        ("-3 a", ["'-3'"]),
        ("0 a", ["'0'"]),
    ],
)
def test_what_is_not_in_the_notation_is_refused(line, words, refused):
    with refused(*words):
        axes.parse_line(line)


@pytest.mark.parametrize(
    ("text", "value"),
    [("i", 5), ("i-1", 4), ("i - 1", 4), ("i+2", 7), ("2", 2), ("-1", 9), ("-3", 7), (" i ", 5)],
)
def test_index_expressions(text, value):
    assert axes.evaluate_index(text, {"i": 5}, last=9) == value


@pytest.mark.parametrize("text", ["", "i*2", "ij", "1.5", "j"])
def test_bad_index_expressions(text, refused):
    with refused(f"{{{text}}}"):
        axes.evaluate_index(text, {"i": 5}, last=9)


def test_bind_names_numbers_and_extents():
    (line,) = axes.parse_line("2 h u + w, _")
    bound = [axes.bind(axis, extent, lambda f: f"{f.name}.7") for axis, extent in zip(line, (14, 5), strict=True)]
    assert bound == [((2, "h.7", "u.7"), ("w.7",)), ((5,),)]
    assert axes.names(bound[0]) == {"h.7", "u.7", "w.7"} and axes.names(bound[1]) == set()


sizes = st.fixed_dictionaries({name: st.integers(1, 4) for name in ("h", "u", "w")})
THERE = Present("h")
terms = st.sampled_from(
    [("h", "u"), ("h",), ("w",), (3, "w"), ("h", 2, "u"), ("w", "h", "u"), (4,), ("h", "u", "w"), (THERE, "w")]
)
inside = st.lists(st.sampled_from([("u",), ("w",), (2, "u"), (3,)]), min_size=1, max_size=3)
sums = inside.map(lambda all_of: [Part(("h", *each), 1, i == 0) for i, each in enumerate(all_of)])
summands = terms.map(lambda term: [term]) | sums
bound_axes = st.lists(summands, min_size=1, max_size=3).map(lambda found: tuple(t for each in found for t in each))


def shape(term, sizes):
    return [s if isinstance(s, int) else sizes[s] for s in term]


@given(bound_axes, sizes)
def test_size_and_solve(axis, sizes):
    extent = sum(np.zeros(shape(term, sizes)).size for term in axis)
    assert axes.axis_size(axis, sizes) == extent
    for name in axes.names(axis):
        others = {n: s for n, s in sizes.items() if n != name}
        known = name not in axes.presences(axis)
        assert axes.solve(axis, extent, others) == ((name, sizes[name]) if known else None)
    assert axes.solve(axis, extent, sizes) is None


@pytest.mark.parametrize(
    ("axis", "extent", "known"),
    [
        ((("h", "u"),), 7, {"h": 2}),  # no whole size
        ((("w",), (5,)), 4, {}),  # less than nothing is left for it
        ((("h", "u"),), 0, {"h": 0}),  # any would do
        (((Present("h"), "w"),), 4, {}),  # h may be none
        ((("h", "u"),), 6, {}),  # two unknown
        ((("w", "w"),), 9, {}),  # not linear
    ],
)
def test_solve_says_none_where_it_cannot_tell(axis, extent, known):
    assert axes.solve(axis, extent, known) is None


def test_solve_finds_that_there_is_none():
    assert axes.solve((("w",), (5,)), 5, {}) == ("w", 0)
    assert axes.solve((("h", "u"), ("h", "w")), 0, {"u": 2, "w": 3}) == ("h", 0)


def test_a_factor_that_is_there_as_long_as_its_name():
    (line,) = axes.parse_line("heads? embed, heads.{i-1}? 512")
    assert line[0] == ((Factor("heads", presence=True), factor("embed")),)
    assert line[1] == ((Factor("heads", indices=("i-1",), presence=True), Factor(number=512)),)
    axis = axes.bind(line[0], 7, lambda f: f"{f.name}.3")
    assert axis == ((1, "embed.3"),) and axes.names(axis) == {"embed.3"} and axes.presences(axis) == {"heads.3"}
    assert [axes.axis_size(axis, {"embed.3": 7, "heads.3": h}) for h in (0, 1, 4)] == [0, 7, 7]
    assert axes.presences(copy.deepcopy(axis)) == axes.presences(pickle.loads(pickle.dumps(axis))) == {"heads.3"}


@st.composite
def choices(draw):
    """Sizes, and kept units for each of h, u (chosen per kept h) and w."""
    size = draw(sizes)

    def kept(name, count=None):
        count = count if count is not None else draw(st.integers(int(name == "u"), size[name]))
        return sorted(draw(st.permutations(range(size[name])))[:count])

    h, w, count = kept("h"), kept("w"), draw(st.integers(1, size["u"]))
    keep = {"h": h, "w": w, "u": [kept("u", count) for _ in h]}
    shapes = {"h": -1, "w": -1, "u": (len(h), count)}
    return size, {name: np.array(k, dtype=int).reshape(shapes[name]) for name, k in keep.items()}


def entries(axis, size):
    """Walk over every position of the axis: the index of each symbol there, by symbol."""
    pending = list(axis)
    while pending:
        term = pending.pop(0)
        if not isinstance(term, Part):
            for flat in range(np.prod(shape(term, size), dtype=int)):
                yield dict(zip(term, np.unravel_index(flat, shape(term, size)), strict=True))
            continue
        beside = [term]
        while pending and isinstance(pending[0], Part) and not pending[0].first:
            beside.append(pending.pop(0))
        for head in range(size["h"]):
            for each in beside:
                for at in entries([tuple(each[1:])], size):
                    yield {"h": head, **at}


def brute_force(axis, size, keep):
    """Ask each symbol at every position of the axis whether it stays."""
    positions = []
    for position, at in enumerate(entries(axis, size)):
        stays = all(at[n] in keep[n] for n in ("h", "w") if n in at) and (THERE not in at or len(keep["h"]))
        if stays and "u" in at:
            stays = at["u"] in keep["u"][list(keep["h"]).index(at["h"])]
        if stays:
            positions.append(position)
    return positions


def test_a_sum_inside_a_product_takes_turns():
    axis = (Part(("h", "u"), 1), Part(("h", "w"), 1, first=False), ("w",))
    keep = {"h": np.array([1]), "u": np.array([[0, 2]]), "w": np.array([1])}
    size = {"h": 2, "u": 3, "w": 2}
    assert axes.axis_size(axis, size) == 12 and axes.solve(axis, 12, {"u": 3, "w": 2}) == ("h", 2)
    assert axes.kept_indices(axis, size, keep, PER).tolist() == [5, 7, 9, 11]
    (stretch,) = axes.views(axis, size, "u", PER)
    assert stretch == ((0, 1, 2, 5, 6, 7), (2, 3), (0, 1))


@given(bound_axes, choices())
def test_kept_indices(axis, choice):
    size, keep = choice
    assert axes.kept_indices(axis, size, keep, PER).tolist() == brute_force(axis, size, keep)


def test_a_name_without_its_parent_stays_whole():
    keep = {"h": np.array([1]), "u": np.array([[0, 2]])}
    assert axes.kept_indices((("u",),), {"h": 2, "u": 3}, keep, PER).tolist() == [0, 1, 2]
    assert axes.kept_indices((("h", "u"),), {"h": 2, "u": 3}, keep, PER).tolist() == [3, 5]
    assert axes.views((("u",),), {"h": 2, "u": 3}, "u", PER) == []


@given(bound_axes, sizes, st.sampled_from("huw"))
def test_views_sum_to_what_index_arithmetic_sums(axis, size, name):
    """Reducing the views of a name gives, for each of its units, the sum over the positions that hold it."""
    values = np.random.default_rng(0).integers(0, 100, axes.axis_size(axis, size))
    parents = (size["h"],) if name in PER else ()
    expected = np.zeros((*parents, size[name]), dtype=int)
    for position, at in enumerate(entries(axis, size)):
        if name in at:
            expected[(at["h"], at["u"]) if name in PER else at[name]] += values[position]
    seen = np.zeros_like(expected)
    for where, stretch, kept in axes.views(axis, size, name, PER):
        others = tuple(d for d in range(len(stretch)) if d not in kept)
        seen += values[list(where)].reshape(stretch).sum(axis=others)
    assert (seen == expected).all()
