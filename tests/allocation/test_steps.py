"""Steps: every one meets its own budget under the same rules, and the plans are one plan of the dense model."""

import pytest
from backbones import SWIN, VIT_TINY, dense
from layer_tables import by_hand

from sidt import Budget, allocate, importance
from sidt.allocation.greedy import Rules
from sidt.allocation.steps import before_last, steps_for
from sidt.cost.complexity import PlanCosts
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model


def prepare(model):
    space = space_for(model)
    return model, importance.random(model, seed=1, space=space), lambda plan: slice_model(model, plan)


def params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("backbone", [VIT_TINY, SWIN], ids=str)
def test_the_bounds_shrink_by_the_same_factor(backbone):
    model, space = dense(backbone)
    seen = []

    def noted(given):
        seen.append(params(given))
        return prepare(given)

    base, budget = before_last(model, Budget(params=0.512), 3, noted)
    whole = int(PlanCosts(space).dense[0])
    assert budget == Budget(params=int(0.512 * whole))
    for found, share in zip([*seen, params(base)], (1, 0.8, 0.64), strict=True):
        assert 0.985 * share * whole <= found <= share * whole
    last = allocate(prepare(base)[1], budget)
    whole_plan = base.sidt_plan.then(last)
    assert whole_plan.space.sizes == space.sizes
    assert params(slice_model(base, last)) == params(slice_model(model, whole_plan)) <= 0.512 * whole
    assert whole_plan.after(base.sidt_plan, last.space).to_json() == last.to_json()


def test_one_step_is_none_on_the_way():
    model, budget = dense(VIT_TINY)[0], Budget(macs=0.5)
    assert before_last(model, budget, 1, None) == (model, budget)


def test_rules_hold_in_every_step():
    rules = Rules(kinds=("mlp",), round_to=8, freeze=("hidden.0",))
    base, _ = before_last(dense(VIT_TINY)[0], Budget(params=0.8), 4, prepare, rules=rules)
    sizes, whole = base.sidt_plan.sizes, base.sidt_plan.space.sizes
    assert sizes["hidden.1"] < whole["hidden.1"] and sizes["hidden.1"] % 8 == 0
    assert all(sizes[name] == whole[name] for name in whole if name != "hidden.1")


def test_a_latency_is_a_part_of_the_dense_time():
    table = by_hand(VIT_TINY)
    base, budget = before_last(dense(VIT_TINY)[0], Budget(latency=0.81), 2, prepare, timed=lambda *_: table)
    assert budget.bounds(1, 1, 1)[2] == pytest.approx(0.81 * table.dense_ms * 1e6, rel=1e-6)
    assert table.milliseconds(base.sidt_plan.sizes) <= 0.9 * table.dense_ms


def test_little_that_stays_is_reached_in_several_steps():
    assert steps_for(Budget(params=0.6)) == steps_for(Budget(params=0.6, macs=100)) == steps_for(Budget(macs="1M")) == 1
    assert (
        steps_for(Budget(params="0.1")) == steps_for(Budget(params=0.1)) == steps_for(Budget(params=0.6, macs=0.05)) > 1
    )
