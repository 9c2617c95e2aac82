"""Allocation: the budget is met and used, the rules are kept, and the best units stay."""

import numpy as np
import pytest
import torch
from backbones import PVT, SWIN, VIT_TINY, dense, random_plan, sublayers
from hypothesis import given
from hypothesis import strategies as st

from sidt import Budget, allocate, importance
from sidt.allocation.greedy import Rules, _Allocation, uniform
from sidt.cost.complexity import PlanCosts
from sidt.errors import InputError
from sidt.importance.scores import Importance
from sidt.space.families import INNER_KINDS, KINDS
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model

FAMILIES = (VIT_TINY, SWIN, PVT)


def cost(plan):
    costs = PlanCosts(plan.space)
    return costs.of(np.array([plan.sizes[n] for n in costs.names])), costs.dense


def random_scores(backbone, seed):
    model, space = dense(backbone)
    return importance.random(model, seed=seed, space=space)


@given(
    backbone=st.sampled_from(FAMILIES),
    seed=st.integers(0, 100),
    params=st.none() | st.floats(0.45, 1.0),
    macs=st.none() | st.floats(0.45, 1.0),
    kinds=st.sampled_from([INNER_KINDS, KINDS, ("mlp", "heads")]),
    least=st.sampled_from([0, 1]),
)
def test_budget_is_met_and_used(backbone, seed, params, macs, kinds, least):
    if kinds == ("mlp", "heads") or (params is None and macs is None):
        params, macs = max(params or 1.0, 0.8), None
    plan = allocate(random_scores(backbone, seed), Budget(params=params, macs=macs), kinds=kinds, min_units=least)
    assert least == 0 or min(plan.sizes.values()) > 0
    used, whole = cost(plan)
    parts = [u / w / limit for u, w, limit in zip(used, whole, (params, macs), strict=True) if limit is not None]
    assert max(parts) <= 1 + 1e-9
    assert max(parts) >= 0.99


@given(seed=st.integers(0, 100), step=st.sampled_from([8, 16]), least=st.sampled_from([0, 1, 8, 20]))
def test_rules_are_kept(seed, step, least):
    scores = random_scores(SWIN, seed)
    plan = allocate(
        scores,
        Budget(params=0.8),
        round_to=step,
        min_units=least,
        freeze=["hidden.2.*", "v.0.0"],
        kinds=("mlp", "qk", "v"),
    )
    for name, dimension in plan.space.dimensions.items():
        size = plan.sizes[name]
        assert size == dimension.size or (size % step == 0 and size >= least)
        assert size or dimension.kind == "mlp"
        if dimension.kind in ("heads", "width") or name == "v.0.0" or name.startswith("hidden.2."):
            assert size == dimension.size
    assert cost(plan)[0][0] <= 0.8 * cost(plan)[1][0]
    assert sum(plan.sizes.values()) < sum(plan.space.sizes.values())


def smallest(scores, **rules):
    """The smallest budget that can be met, as the refusal of a smaller one says."""
    with pytest.raises(InputError) as error:
        allocate(scores, Budget(params=1e-4), **rules)
    return int(str(error.value).split("smallest reachable params is ")[1].split()[0])


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_sublayers_go_where_the_budget_asks_for_it(backbone, step):
    scores = random_scores(backbone, 0)
    one, none = (smallest(scores, min_units=least, round_to=step) for least in (1, 0))
    assert none < one
    bare = allocate(scores, Budget(params=none), min_units=0, round_to=step)
    assert cost(bare)[0][0] == none
    assert {bare.sizes[n] for n, d in bare.space.dimensions.items() if d.kind in ("heads", "mlp")} == {0}
    assert all(bare.sizes[n] == 1 for n, d in bare.space.dimensions.items() if d.per)
    some = allocate(scores, Budget(params=one - 1), min_units=0, round_to=step)
    assert 0.97 * one <= cost(some)[0][0] < one and 0 in some.sizes.values()
    sliced = slice_model(dense(backbone)[0], some)
    assert sum(p.numel() for p in sliced.parameters()) == cost(some)[0][0]


def test_the_block_that_scores_nothing_goes_first():
    scores = random_scores(VIT_TINY, 0)
    weak = {n: s * (1e-6 if n.endswith(".1") else 1) for n, s in scores.scores.items()}
    plan = allocate(Importance(scores.space, weak), Budget(params=0.5), min_units=0)
    assert plan.sizes["heads.1"] == plan.sizes["hidden.1"] == 0 < plan.sizes["heads.0"]
    assert allocate(Importance(scores.space, weak), Budget(params=0.5)).sizes["heads.1"] == 1


def bookkeeping(backbone, seed, **rules):
    costs = PlanCosts(dense(backbone)[1])
    return _Allocation(random_scores(backbone, seed), costs, Rules(KINDS, **rules), {}, {})


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_what_a_step_saves_is_known_after_every_step(backbone):
    """In any order of steps, down to nothing: costs are no sums, and not even linear where a sublayer goes."""
    state, rng = bookkeeping(backbone, 0, min_units=0, round_to=16), np.random.default_rng(0)
    every = np.arange(len(state.dims))
    while len(able := np.flatnonzero(state.target < state.size)):
        i = int(rng.choice(able))
        state._set(i, int(state.target[i]))
        assert (state.saved == state.costs.savings(state.size, state.target, every)).all()
    assert {int(s) for s, d in zip(state.size, state.dims, strict=True) if d.kind in ("heads", "mlp")} == {0}


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_a_model_without_some_sublayers_is_searched_further(backbone, least):
    model, space = dense(backbone)
    gone = sublayers(space, "together")
    sliced = slice_model(model, random_plan(space, 0, empty=gone))
    inner = space_for(sliced, backbone.input_size)
    batches = [(backbone.images(2), torch.arange(2))]
    for scores in (
        importance.taylor(sliced, batches, space=inner),
        importance.activation(sliced, batches, space=inner),
    ):
        plan = allocate(scores, Budget(params=0.8), min_units=least)
        assert all(not plan.sizes[name] for name in gone)
        again = slice_model(sliced, plan)
        assert sum(p.numel() for p in again.parameters()) == cost(plan)[0][0] <= 0.8 * cost(plan)[1][0]
    assert all(not uniform(inner, Budget(params=0.8)).sizes[name] for name in gone)


def test_sublayers_that_are_gone_come_back():
    state = bookkeeping(PVT, 0, min_units=0, round_to=8)
    for name in ("heads.1.0", "hidden.1.0", "hidden.2.0"):
        state._set(state.column[name], 0)
    state._give_back([0, 1], state.costs.dense)
    assert (state.size == state._whole()).all()
    state._set(state.column["qk.0.0"], 8)
    state._set(state.column["heads.0.0"], 0)
    state._give_back([0], state.costs.of(state.size)[:1])
    assert state.size[state.column["heads.0.0"]] == 0 and state.size[state.column["qk.0.0"]] == 8


def test_the_best_units_of_every_dimension_stay():
    scores = random_scores(VIT_TINY, 3)
    plan = allocate(scores, Budget(params=0.5))
    for name, dimension in plan.space.dimensions.items():
        values, kept = scores.scores[name], plan.keep[name]
        rows = [values] if dimension.per is None else values[plan.keep[dimension.per]]
        for row, chosen in zip(rows, np.atleast_2d(kept), strict=True):
            dropped = np.delete(row, chosen)
            assert not len(dropped) or row[chosen].min() >= dropped.max()


def test_scores_are_compared_per_cost():
    """Two MLP units of equal score: where a unit costs the same the ranking decides, and multipliers shift it."""
    model, space = dense(VIT_TINY)
    scores = {n: np.ones_like(s) for n, s in importance.random(model, space=space).scores.items()}
    ones = Importance(space, scores)
    # A q/k unit is in every head, and has two rows where an MLP unit has a row and a column: with score 1 a unit
    # and head, three heads lose 3 points for 3 * 2 * 193 parameters, an MLP unit 1 point for 385.
    plan = allocate(ones, Budget(params=0.9), kinds=("qk", "mlp"))
    assert plan.sizes["qk.0"] < 64 and plan.sizes["hidden.0"] == 768
    plan = allocate(ones, Budget(params=0.9), kinds=("qk", "mlp"), multipliers={"hidden.0": 0.5})
    assert plan.sizes["qk.0"] == 64 and plan.sizes["hidden.0"] < 768 and plan.sizes["hidden.1"] == 768


def test_full_budget_keeps_everything():
    plan = allocate(random_scores(VIT_TINY, 0), Budget(params=1.0))
    assert plan.sizes == plan.space.sizes


def test_an_unreachable_budget_names_the_smallest(refused):
    scores = random_scores(VIT_TINY, 0)
    with refused("params=0.01", "smallest reachable params is"):
        allocate(scores, Budget(params=0.01))
    least = smallest(scores)
    plan = allocate(scores, Budget(params=least))
    assert cost(plan)[0][0] == least
    with refused(str(least)):
        allocate(scores, Budget(params=least - 1))


def test_nothing_that_may_shrink(refused):
    with refused("no dimension may shrink", "width", "embed"):
        allocate(random_scores(VIT_TINY, 0), Budget(params=0.5), kinds=("width",), freeze=("embed",))


def test_bad_rules(refused):
    scores = random_scores(VIT_TINY, 0)
    with refused("freeze", "'nose.*'"):
        allocate(scores, Budget(params=0.6), freeze=["nose.*"])
    with refused("kinds", "depth"):
        allocate(scores, Budget(params=0.6), kinds=("depth",))
    with refused("round_to", "0"):
        allocate(scores, Budget(params=0.6), round_to=0)
    with refused("min_units", "-1", "at least 0"):
        allocate(scores, Budget(params=0.6), min_units=-1)


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_larger_budgets_keep_more(backbone):
    scores = random_scores(backbone, 1)
    small, large = (cost(allocate(scores, Budget(params=p)))[0][0] for p in (0.5, 0.8))
    assert small < large


def alike(space, sizes):
    """The sizes of each kind in each stage."""
    found = {}
    for name, dimension in space.dimensions.items():
        if dimension.kind != "width":
            found.setdefault((dimension.kind, dimension.index[:-1]), set()).add(sizes[name])
    return found


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_uniform_sizes_are_the_same_in_every_block(backbone, share):
    scores = random_scores(backbone, 0)
    space = scores.space.ordered([n for n, d in scores.space.dimensions.items() if d.kind == "width"])
    scores = Importance(space, scores.scores)
    plan = allocate(scores, Budget(params=share), uniform=True)
    used, whole = cost(plan)
    assert 0.95 * share < used[0] / whole[0] <= share
    found = alike(space, plan.sizes)
    assert all(len(sizes) == 1 for sizes in found.values())
    stages = {stage for _, stage in found}
    assert all(found["qk", stage] == found["v", stage] for stage in stages)
    for name in space.tied:
        stage = space.dimensions[name].index
        assert plan.sizes[name] == min(found["heads", stage]) * min(found["v", stage])
    if backbone is SWIN:
        assert not space.tied
        assert [plan.sizes[f"embed.{s}"] for s in range(4)] == [plan.sizes["embed.0"] * 2**s for s in range(4)]


def test_uniform_keeps_the_rules_and_the_best_units():
    scores = random_scores(VIT_TINY, 0)
    space = scores.space.ordered(["embed"])
    plan = allocate(Importance(space, scores.scores), Budget(params=0.5), uniform=True, round_to=8)
    assert all(plan.sizes[n] % 8 == 0 for n, d in space.dimensions.items() if d.kind != "heads")
    best = np.argsort(-scores.scores["hidden.0"], kind="stable")[: plan.sizes["hidden.0"]]
    assert set(plan.keep["hidden.0"]) == set(best)
    frozen = allocate(Importance(space, scores.scores), Budget(params=0.7), uniform=True, freeze=["hidden.1"])
    assert frozen.sizes["hidden.0"] == space.sizes["hidden.0"]


def test_uniform_without_a_width_that_may_shrink():
    """timm makes the width of the heads and their size, so these stay too."""
    scores = random_scores(VIT_TINY, 0)
    plan = allocate(scores, Budget(params=0.6), uniform=True)
    assert plan.sizes["heads.0"] == 3 and plan.sizes["qk.0"] == 64 and plan.sizes["hidden.0"] < 768
    with pytest.raises(InputError, match="same sizes in every block"):
        allocate(scores, Budget(params=0.2), uniform=True)
    with pytest.raises(InputError, match="min_units"):
        allocate(scores, Budget(params=0.6), uniform=True, min_units=0)
