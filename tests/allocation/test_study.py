"""The study: starts at the plain ranking, stays within the budget, resumes, and says honestly what it gained."""

import copy
import logging
import multiprocessing
import sqlite3

import numpy as np
import optuna
import pytest
import torch
from backbones import SWIN, VIT_TINY, dense
from layer_tables import rotated_space

from sidt import Budget, allocate, importance, search
from sidt.allocation.curve import Point, knees, nearest
from sidt.allocation.greedy import Rules
from sidt.allocation.knobs import plan_at
from sidt.allocation.study import Gain
from sidt.cost.complexity import PlanCosts
from sidt.surgery.slicing import slice_model

BUDGET = Budget(params=0.7)


def scores(backbone=VIT_TINY):
    model, space = dense(backbone)
    return model, importance.random(model, seed=1, space=space)


def hidden(block):
    """An objective that wants block's MLP wide: a search can reach it by a depth multiplier."""
    return lambda model: np.full(4, model.blocks[block].mlp.fc1.out_features / 768)


def run(objective=None, trials=6, **options):
    model, found = scores()
    return search(model, found, BUDGET, objective or hidden(1), trials=trials, progress=False, **options)


def test_first_trial_is_the_plain_ranking_and_the_best_is_at_least_that():
    result = run(trials=12)
    first = result.study.trials[0]
    assert set(first.params.values()) == {0.0}
    assert result.plain_value == first.values[0]
    assert result.plain.to_json() == allocate(scores()[1], BUDGET).to_json()
    assert result.value > result.plain_value
    assert result.plan.sizes["hidden.1"] / 768 == result.value


def test_scores_read_from_a_file_go_on_with_the_study_of_those_that_were_measured(tmp_path):
    model, measured = scores()
    measured.save(tmp_path / "scores.safetensors")
    read = importance.load_importance(tmp_path / "scores.safetensors", measured.space)
    backwards = importance.Importance(measured.space, dict(reversed(measured.scores.items())))
    names = {
        search(model, found, BUDGET, hidden(1), trials=1, progress=False).study.study_name
        for found in (measured, read, backwards)
    }
    assert len(names) == 1


@pytest.mark.parametrize("backbone", [VIT_TINY, SWIN], ids=str)
def test_every_trial_meets_the_budget(backbone):
    model, found = scores(backbone)
    result = search(model, found, BUDGET, lambda m: np.zeros(2), trials=5, progress=False)
    limit = 0.7 * PlanCosts(found.space).dense[0]
    used = [t.user_attrs["params"] for t in result.study.trials]
    assert len(used) == 5 and max(used) <= limit and min(used) >= 0.99 * limit
    assert len({t.user_attrs["macs"] for t in result.study.trials}) > 1
    assert result.plan.to_json() == result.plain.to_json()  # all trials tie: the plain ranking stands


def test_rules_reach_every_trial():
    result = run(rules=Rules(kinds=("mlp", "v"), round_to=8, freeze=("hidden.0",)))
    assert result.plan.sizes["qk.1"] == 64 and result.plan.sizes["hidden.0"] == 768
    assert result.plan.sizes["hidden.1"] % 8 == 0 and result.plan.sizes["v.0"] % 8 == 0


def test_interrupted_search_resumes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optuna"), "handlers", [caplog.handler])
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    calls = []

    def stops_at_third(model):
        calls.append(model)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hidden(1)(model)

    with pytest.raises(KeyboardInterrupt):
        run(stops_at_third, storage=storage)
    assert not caplog.text  # Optuna would show where it was, with a traceback
    result = run(storage=storage)
    complete = result.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(complete) == 6
    assert sum(set(t.params.values()) == {0.0} for t in complete) == 1
    again = run(lambda model: pytest.fail("nothing is left to do"), storage=storage)
    assert again.plan.to_json() == result.plan.to_json()


def test_a_search_stopped_in_its_first_trial_still_tries_the_plain_ranking(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop, storage=storage)
    assert run(storage=storage, trials=3).plain_value > 0


def test_one_storage_keeps_different_searches_apart(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = run(storage=storage, trials=2)
    model, found = scores()
    second = search(model, found, Budget(params=0.5), hidden(1), trials=2, storage=storage, progress=False)
    assert first.study.study_name != second.study.study_name
    assert len(second.study.trials) == 2


def test_same_seed_same_search():
    assert run(seed=3).plan.to_json() == run(seed=3).plan.to_json()


def test_pareto():
    """One study over all budgets: a curve, whose point at the budget is the plan, and a plan at any other."""
    model, space = dense(VIT_TINY)
    scores = importance.magnitude(model, space=space)
    costs = PlanCosts(space)

    def wants_size(small):
        return np.array([float(sum(p.numel() for p in small.parameters()))])

    budget = Budget(params=0.8)
    result = search(model, scores, budget, wants_size, trials=12, pareto=True, progress=False)
    shares, values = [p.share for p in result.front], [p.value for p in result.front]
    assert len(shares) > 2 and shares == sorted(set(shares)) and values == sorted(set(values))
    for plan, share in ((result.plan, 0.8), (plan_at(scores, Budget(params=0.7), result.front[0].knobs), 0.7)):
        used = costs.of(np.array([plan.sizes[n] for n in costs.names]))[0] / costs.dense[0]
        assert 0.99 * share <= used <= share
    for point in result.front:  # what is told of a point is what its plan costs
        plan = plan_at(scores, Budget(params=point.share), point.knobs)
        assert [*costs.of(np.array([plan.sizes[n] for n in costs.names]))] == [point.params, point.macs]
        assert point.value == point.params


def test_a_curve_serves_every_budget(tmp_path):
    """A search with another budget goes on with the same study, also where that has all its trials already."""
    model, found = scores()
    options = {"trials": 3, "pareto": True, "progress": False, "storage": f"sqlite:///{tmp_path / 'study.db'}"}
    searches = [search(model, found, Budget(params=share), hidden(1), **options) for share in (0.8, 0.5)]
    assert len({found.study.study_name for found in searches}) == 1 and len(searches[1].front) > 0
    assert searches[1].plain.to_json() == allocate(found, Budget(params=0.5)).to_json()
    assert searches[1].plain_value == hidden(1)(slice_model(model, searches[1].plain)).mean()


def test_a_curve_starts_with_no_trial_twice():
    """Also where the budget is one of the shares that every curve starts with."""
    model, found = scores()
    study = search(model, found, Budget(params=0.4), hidden(1), trials=4, pareto=True, progress=False).study
    seen = [{k: round(v, 3) for k, v in trial.params.items()} for trial in study.trials]
    assert all(seen.count(params) == 1 for params in seen)


def test_a_curve_goes_along_one_bound(refused):
    model, space = dense(VIT_TINY)
    with refused("several bounds", "give one"):
        search(model, importance.magnitude(model, space=space), Budget(params=0.8, macs=0.8), np.array, pareto=True)


def test_the_nearest_point_and_the_knees():
    curve = [Point(value, share, 0, 0, {}) for value, share in ((0.1, 0.1), (0.6, 0.2), (0.65, 0.4), (0.9, 0.8))]
    assert nearest(curve, 0.29).share == 0.4 and nearest(curve, 0.28).share == 0.2  # as a ratio: 0.283 is between
    assert [p.share for p in knees(curve)] == [0.1, 0.2, 0.8]
    assert knees(curve[:1]) == curve[:1]
    near = [Point(value, share, 1, 1, {}) for value, share in ((0.0, 0.1), (0.5, 0.101), (0.6, 0.5))]
    assert [p.share for p in knees(near)] == [0.101, 0.5]  # of two at one cost, the better


def test_gain_is_measured_on_fresh_data_and_paired():
    def fresh(model):
        return hidden(1)(model) + np.array([0.0, 0.1, 0.2, 0.3])

    result = run(trials=12, fresh=fresh)
    gain = result.gain
    assert gain.samples == 4 and gain.error == pytest.approx(0, abs=1e-12)  # the samples' own spread cancels
    assert gain.difference == pytest.approx(result.value - result.plain_value)
    assert "gained" in str(gain)


@pytest.mark.parametrize(
    ("found", "words"), [(0.80, "nothing beyond noise"), (0.90, "gained"), (0.60, "LOST"), (0.75, "nothing")]
)
def test_gain_says_whether_it_is_more_than_noise(found, words):
    assert "no trial was better" in str(Gain(0.77, 0.77, 0.0, 100))
    assert words in str(Gain(0.77, found, 0.03, 100))


def test_a_hopeless_trial_is_stopped_after_its_first_parts():
    """Noise-free parts: whatever is worse than the best so far is so in every part, each time by another amount, since
    SciPy's test takes all signs of equal ones, which is slow."""
    seen = []

    def in_parts(model):
        width = model.blocks[1].mlp.fc1.out_features / 768
        for part in range(16):
            seen.append(part)
            yield np.full(4, width * (1 + part))

    result = run(in_parts, trials=15)
    pruned = [t for t in result.study.trials if t.state == optuna.trial.TrialState.PRUNED]
    assert result.pruned == len(pruned) > 0
    assert all(2 <= len(t.intermediate_values) < 16 for t in pruned)
    assert len(seen) == sum(len(t.intermediate_values) for t in result.study.trials) < 15 * 16
    whole = [t for t in result.study.trials if t not in pruned]
    assert result.value == max(t.values[0] for t in whole)
    best = result.plan.sizes["hidden.1"] / 768
    assert result.value == pytest.approx(best * 8.5)
    assert all(t.intermediate_values[0] <= best for t in pruned)


def test_parts_are_the_same_as_the_whole():
    def in_parts(model):
        return iter(hidden(1)(model).reshape(2, 2))

    whole, parts = run(trials=2), run(in_parts, trials=2)
    assert [t.values for t in whole.study.trials] == [t.values for t in parts.study.trials]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "gp", "random"])
def test_every_sampler_starts_at_the_plain_ranking_and_stays_in_range(sampler):
    result = run(trials=8, sampler=sampler)
    assert set(result.study.trials[0].params.values()) == {0.0}
    assert len(result.study.trials) == 8
    assert all(abs(v) <= 2 for t in result.study.trials for v in t.params.values())
    assert len({tuple(t.params.values()) for t in result.study.trials}) == 8


def test_a_warm_start_comes_right_after_the_plain_ranking():
    found = run(trials=12)
    model, importance_ = scores()
    warm = search(
        model,
        importance_,
        Budget(params=0.6),
        hidden(1),
        trials=2,
        warm=[found.multipliers, {"kind.none": 1.0, "kind.mlp": 9.0}],
        progress=False,
    )
    first, second = warm.study.trials[:2]
    assert set(first.params.values()) == {0.0}
    assert second.params == pytest.approx(found.multipliers)
    third = run(trials=2, warm=[{"kind.none": 1.0, "kind.mlp": 9.0}]).study.trials[1].params
    assert "kind.none" not in third and third["kind.mlp"] == 2.0 and third["kind.qk"] == 0.0


def test_the_slicer_makes_every_model():
    made = []
    model = scores()[0]

    def slicer(plan):
        made.append(plan)
        return slice_model(model, plan)

    result = run(trials=3, slicer=slicer, fresh=hidden(0))
    assert len(made) == 3 + 2
    assert [p.sizes for p in made[-2:]] == [result.plain.sizes, result.plan.sizes]


def test_several_trials_at_a_time():
    result = run(trials=6, jobs=2)
    assert len(result.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))) >= 6
    assert result.value >= result.plain_value


def test_workers_never_get_the_same_trial(tmp_path):
    """SQLite does not lock a waiting trial's row; two threads got the same one in one search of five."""
    for round in range(4):
        result = run(trials=8, jobs=3, storage=f"sqlite:///{tmp_path / str(round)}.db")
        assert [t.state for t in result.study.trials] == [optuna.trial.TrialState.COMPLETE] * 8
        assert len({tuple(t.params.values()) for t in result.study.trials}) == 8


def _search(url, gate, results):
    gate.wait()
    results.put(run(trials=9, jobs=2, storage=url).value)


def test_processes_share_a_new_sqlite_file(tmp_path):
    context, url = multiprocessing.get_context("fork"), f"sqlite:///{tmp_path / 'study.db'}"
    gate, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_search, args=(url, gate, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    values = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    result = run(lambda model: pytest.fail("nothing is left to do"), trials=9, storage=url)
    assert 9 <= len(result.study.trials) <= 9 + 3 * 2 and result.value >= max(values)


def test_the_plain_ranking_counts_where_its_trial_did_not_end(tmp_path):
    """Of several workers, one may stop the plain ranking's trial, or be still at it."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = run(trials=3, storage=storage).study
    plain = next(t for t in first.trials if set(t.params.values()) == {0.0})
    first._storage._backend.engine.dispose()
    with sqlite3.connect(tmp_path / "study.db") as file:
        file.execute("UPDATE trials SET state = 'PRUNED' WHERE number = ?", (plain.number,))
    result = run(lambda model: np.full(4, 0.5), trials=3, storage=storage)
    assert result.plain_value == 0.5 and result.value >= 0.5


def test_another_model_has_its_own_trials(tmp_path):
    """Random scores are the same for every model of a size; the trials of one are not those of its retrained self."""
    model, found = scores()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias.add_(1.0)
    options = {"trials": 2, "storage": f"sqlite:///{tmp_path / 'study.db'}", "progress": False}

    def bias(small):
        return small.head.bias.detach()

    values = [search(m, found, BUDGET, bias, **options).value for m in (model, other, model)]
    assert values[1] == pytest.approx(values[0] + 1.0) and values[2] == values[0]


@pytest.mark.parametrize(
    "form",
    [float, np.float32, lambda x: [x, x], lambda x: torch.tensor([x, x]), lambda x: torch.tensor(x), lambda x: (x,),
     lambda x: iter([x, x, x]), lambda x: np.array([[x], [x]]), lambda x: (torch.tensor([x]) for _ in range(3))],
)  # fmt: skip
def test_an_objective_may_give_its_scores_as_it_likes(form):
    """One number a model, or a number a sample; the search is the same."""

    def given(model):
        return form(float(hidden(1)(model).mean()))

    result, plain = run(given, fresh=given), run()
    assert result.plan.to_json() == plain.plan.to_json() and result.value == pytest.approx(plain.value)
    assert "error" not in str(result.gain) or "nan" not in str(result.gain)


def test_one_number_says_no_error():
    gain = run(fresh=lambda model: float(hidden(1)(model).mean()), trials=12).gain
    assert gain.samples == 1 and "no error" in str(gain)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (None, "None"),
        ("good", "good"),
        ({"top1": 0.5}, "top1"),
        (float("nan"), "1 of 1"),
        (np.array([0.5, np.nan, np.inf]), "2 of 3"),
        (np.array([]), "empty"),
        ([], "empty"),
        (iter([]), "no score"),
        ([np.array([0.5]), np.array([])], "empty"),
    ],
)
def test_what_is_no_score_is_refused(given, word, refused):
    with refused("objective", word, "one number"):
        run(lambda model: given)


def test_bad_input(refused, tmp_path):
    with refused("sampler", "anneal", "tpe"):
        run(sampler="anneal")
    with refused("jobs", "0"):
        run(jobs=0)
    with refused("trials", "0"):
        run(trials=0)
    with refused("storage", "nowhere"):
        run(storage=f"sqlite:///{tmp_path / 'nowhere' / 'study.db'}")
    model, found = scores()
    with refused("smallest reachable params"):
        search(model, found, Budget(params=0.001), hidden(0), progress=False)


def test_so_little_width_that_the_budget_is_not_used_is_not_taken():
    """With a half of the width everything else would fit whole; the plan still uses the budget."""
    space = rotated_space(VIT_TINY)
    found, costs = importance.random(dense(VIT_TINY)[0], seed=0, space=space), PlanCosts(space)
    plan = plan_at(found, Budget(params=0.9), {"width": -1.0})
    used = costs.of(np.array([plan.sizes[n] for n in costs.names]))[0] / costs.dense[0]
    assert 0.99 * 0.9 <= used <= 0.9
    less = plan_at(found, Budget(params=0.2), {"width": -0.25}).sizes["embed"]
    assert less < allocate(found, Budget(params=0.2)).sizes["embed"]
