"""Allocation: the budget is met and used, the rules are kept, and the best units stay."""

import numpy as np
import pytest
from backbones import PVT, SWIN, VIT_TINY, dense
from hypothesis import given
from hypothesis import strategies as st

from sidt import Budget, allocate, importance
from sidt.complexity import PlanCosts
from sidt.families import INNER_KINDS, KINDS
from sidt.importance import Importance

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
)
def test_budget_is_met_and_used(backbone, seed, params, macs, kinds):
    if kinds == ("mlp", "heads") or (params is None and macs is None):
        params, macs = max(params or 1.0, 0.8), None
    plan = allocate(random_scores(backbone, seed), Budget(params=params, macs=macs), kinds=kinds)
    used, whole = cost(plan)
    parts = [u / w / limit for u, w, limit in zip(used, whole, (params, macs), strict=True) if limit is not None]
    assert max(parts) <= 1 + 1e-9
    assert max(parts) >= 0.99


@given(seed=st.integers(0, 100), step=st.sampled_from([8, 16]), least=st.sampled_from([1, 8, 20]))
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
        if dimension.kind in ("heads", "width") or name == "v.0.0" or name.startswith("hidden.2."):
            assert size == dimension.size
    assert cost(plan)[0][0] <= 0.8 * cost(plan)[1][0]
    assert sum(plan.sizes.values()) < sum(plan.space.sizes.values())


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
    try:
        allocate(scores, Budget(params=0.01))
    except ValueError as error:
        smallest = int(str(error).split("smallest reachable params is ")[1].split()[0])
    plan = allocate(scores, Budget(params=smallest))
    assert cost(plan)[0][0] == smallest
    with refused(str(smallest)):
        allocate(scores, Budget(params=smallest - 1))


def test_bad_rules(refused):
    scores = random_scores(VIT_TINY, 0)
    with refused("freeze", "'nose.*'"):
        allocate(scores, Budget(params=0.6), freeze=["nose.*"])
    with refused("kinds", "depth"):
        allocate(scores, Budget(params=0.6), kinds=("depth",))
    with refused("round_to", "0"):
        allocate(scores, Budget(params=0.6), round_to=0)
    with refused("min_units", "-1"):
        allocate(scores, Budget(params=0.6), min_units=-1)


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_larger_budgets_keep_more(backbone):
    scores = random_scores(backbone, 1)
    small, large = (cost(allocate(scores, Budget(params=p)))[0][0] for p in (0.5, 0.8))
    assert small < large
