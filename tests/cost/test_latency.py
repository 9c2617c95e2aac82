"""Latencies: tables say what was measured, plans keep to them, and files tell where they are from."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from backbones import BACKBONES, SWIN, VIT_TINY, dense, random_plan
from hypothesis import given
from hypothesis import strategies as st
from layer_tables import FAMILIES, by_hand, random_scores, rotated_space
from torch import nn

from sidt import Budget, allocate
from sidt.allocation.study import search
from sidt.allocation.timing import first_units, measure_layers, time_plans, timed_layers
from sidt.cost.clock import whereabouts
from sidt.cost.complexity import PlanCosts
from sidt.cost.latency import STEP, LayerLatencies, LayerTable, TimedPlanCosts, differences, grid_of, load_latencies
from sidt.space.families import INNER_KINDS
from sidt.space.space import Dimension


@cache
def measured(backbone) -> LayerLatencies:
    return measure_layers(*dense(backbone), rounds=1, progress=False)


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
@pytest.mark.parametrize("tables", [by_hand, measured])
def test_the_dense_plan_takes_what_the_dense_model_took(backbone, tables):
    latencies = tables(backbone)
    assert latencies.milliseconds(latencies.space.sizes) == pytest.approx(latencies.dense_ms, abs=1e-6)
    assert latencies.tightened(0.3).milliseconds(latencies.space.sizes) == pytest.approx(latencies.dense_ms, abs=1e-6)


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_the_points_of_the_grid_are_exact(backbone):
    """One layer at a point of its grid, the others dense: the model takes that much less."""
    latencies = by_hand(backbone)
    for table in latencies.tables[:3]:
        (dims,) = table.layers.values()
        times = table.smooth()
        for point in np.ndindex(times.shape):
            sizes = {name: table.grid[axis][i] for axis, (name, i) in enumerate(zip(dims, point, strict=True))}
            expected = latencies.dense_ms - (times.flat[-1] - times[point])
            assert latencies.milliseconds(latencies.space.sizes | sizes) == pytest.approx(expected, abs=1e-5)


def test_sizes_between_the_points_lie_between():
    latencies = by_hand(VIT_TINY)
    sizes, hidden = latencies.space.sizes, grid_of(latencies.space.dimensions["hidden.0"])
    low, middle, high = (latencies.milliseconds(sizes | {"hidden.0": s}) for s in (hidden[3], 320, hidden[4]))
    assert hidden[3] < 320 < hidden[4]
    share = (320 - hidden[3]) / (hidden[4] - hidden[3])
    assert middle == pytest.approx(low + share * (high - low), abs=1e-5)


def test_sizes_take_as_long_as_the_next_multiple_and_nothing_takes_no_time():
    latencies = by_hand(VIT_TINY)
    sizes = latencies.space.sizes
    times = {s: latencies.milliseconds(sizes | {"hidden.0": s}) for s in (0, 1, 7, 8, 9, 16)}
    assert times[1] == times[7] == times[8] < times[9] == times[16]
    whole = latencies.tables[1].smooth()[-1]
    assert "blocks.0.mlp" in latencies.tables[1].layers
    assert times[0] == pytest.approx(latencies.dense_ms - whole, abs=1e-5)
    none = [latencies.milliseconds(sizes | {"heads.0": 0, "qk.0": s, "v.0": 1}) for s in (1, 64)]
    assert none[0] == none[1]


def test_growing_times_keep_their_steps_and_noise_is_smoothed():
    def smooth(*times):
        return LayerTable({"a": ("hidden.0",)}, (tuple(range(8, 8 * len(times) + 8, 8)),), list(times)).smooth()

    seen = (1.0, 1.1, 3.0, 3.1, 9.0)
    assert smooth(*seen) == pytest.approx(np.array(seen), abs=0.01 * 9)
    noisy = smooth(1.0, 3.0, 2.0, 4.5, 4.0)
    assert (np.diff(noisy) > 0).all()  # no step is flat, or a search could not pass it
    assert noisy[-1] == 4.0  # the dense model is what it is
    assert noisy[1:3] == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_measured_times_grow_with_every_size(backbone):
    latencies, rng = measured(backbone), np.random.default_rng(0)
    whole = np.array(list(latencies.space.sizes.values()))
    small = rng.integers(1, whole + 1, (200, len(whole)))
    large = np.minimum(small + rng.integers(0, 30, small.shape), whole)
    assert (latencies.nanoseconds(small) <= latencies.nanoseconds(large)).all()
    assert (latencies.nanoseconds(small) <= latencies.nanoseconds(whole)).all()


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_the_third_cost_is_the_latency(backbone):
    latencies = by_hand(backbone)
    plain, costs = PlanCosts(latencies.space), TimedPlanCosts(latencies.space, latencies)
    plans = [random_plan(latencies.space, seed, INNER_KINDS).sizes for seed in range(3)]
    rows = np.array([[sizes[n] for n in costs.names] for sizes in plans])
    assert (costs.of(rows)[:, :2] == plain.of(rows)).all()
    assert costs.of(rows)[:, 2] / 1e6 == pytest.approx([latencies.milliseconds(s) for s in plans])
    assert costs.dense[2] == round(latencies.dense_ms * 1e6)


def test_tables_of_another_model(refused):
    with refused("other sizes", "VisionTransformer"):
        TimedPlanCosts(dense(SWIN)[1], by_hand(VIT_TINY))


# --- measuring ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES, ids=str)
def test_every_inner_dimension_is_in_one_layer(backbone):
    model, space = dense(backbone)
    layers = timed_layers(model, space, nn.Module.__call__)
    covered = [name for _, dims in layers.values() for name in dims]
    assert sorted(covered) == sorted(d.name for d in space.dimensions.values() if d.kind != "width")
    assert set(space.attention.values()) <= set(layers)
    kinds = [{space.dimensions[name].kind for name in dims} for _, dims in layers.values()]
    both = any(word in backbone.name for word in ("_xp_", "pwee"))  # side by side in one module
    assert any({"heads", "mlp"} <= found for found in kinds) == both  # else attention and MLP are apart


@pytest.mark.parametrize("backbone", [VIT_TINY, SWIN], ids=str)
def test_widths_that_are_rotated_are_timed_with_the_layers_that_have_them(backbone):
    """Every layer with a rotated width, alone or beside another one, at every point of its grid."""
    model, space = dense(backbone)[0], rotated_space(backbone)
    layers = timed_layers(model, space, nn.Module.__call__)
    for name, (_, dims) in timed_layers(*dense(backbone), nn.Module.__call__).items():
        assert dims == tuple(d for d in layers[name][1] if not d.startswith("embed"))
    known = {n.rpartition(".")[0] for n, p in space.places.items() if space.rotated() and "embed" in str(p.axes)}
    widths = {d for _, dims in layers.values() for d in dims if d.startswith("embed")}
    assert widths == set(space.rotated()) and len(layers) < len(known)
    tables = measure_layers(model, space, rounds=1, progress=False).tables  # raises if a point was not timed
    assert max(sum(d.startswith("embed") for d in next(iter(t.layers.values()))) for t in tables) == 1 + (
        backbone == SWIN
    )
    assert {d for t in tables for dims in t.layers.values() for d in dims} == set(space.sizes) - (
        set() if backbone == VIT_TINY else {"embed.0"}
    )


@pytest.mark.parametrize("backbone", [VIT_TINY, SWIN], ids=str)
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_widths_that_are_rotated_are_searched_within_a_latency(backbone, share):
    latencies, scores = by_hand(backbone, rotated=True), random_scores(backbone, rotated=True)
    whole = latencies.dense_ms - sum(float(np.max(t.milliseconds)) for t in latencies.tables)
    budget = Budget(latency=f"{whole + share * (latencies.dense_ms - whole)}ms")
    widths = latencies.space.rotated()
    plan = allocate(scores, budget, latencies=latencies, multipliers=dict.fromkeys(widths, 1e-3))
    assert budget.bounds(1, 1, 1)[2] >= round(latencies.milliseconds(plan.sizes) * 1e6)
    assert any(plan.sizes[w] < latencies.space.sizes[w] for w in widths)
    assert all(plan.sizes[w] % STEP == 0 for w in widths)
    kept = allocate(scores, budget, freeze=widths, latencies=latencies)
    assert all(kept.sizes[w] == latencies.space.sizes[w] for w in widths)


def test_equal_layers_share_a_table():
    assert [len(table.layers) for table in measured(VIT_TINY).tables] == [2, 2]
    # Swin's third stage has a block with a shift, whose attention is given a mask.
    masked = [sorted(table.layers) for table in measured(SWIN).tables if any("layers.2" in n for n in table.layers)]
    assert ["layers.2.blocks.0.mlp", "layers.2.blocks.1.mlp"] in masked


def test_measuring_leaves_the_model_alone():
    model, space = dense(VIT_TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    try:
        measure_layers(model, space, rounds=1, progress=False)
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_cost_is_said_first_and_the_whole_is_more_than_its_layers():
    model, space = dense(VIT_TINY)
    said = []
    latencies = measure_layers(model, space, rounds=1, say=said.append, progress=False)
    assert len(said) == 1 and "27 sizes of 4 layers" in said[0]
    seen = time_plans(model, [first_units(space, {})], ["blocks.0.mlp", "blocks.1.mlp"], rounds=2, progress=False)
    assert seen.shape[0] == 2 and seen.shape[-1] == 3
    assert (seen[..., 0] > seen[..., 1:].sum(axis=-1)).all() and (seen > 0).all()
    assert latencies.where == whereabouts(model, space, 1)


@pytest.mark.parametrize(
    ("kind", "size", "grid"),
    [
        ("mlp", 64, (8, 16, 24, 32, 40, 48, 56, 64)),
        ("qk", 64, (8, 32, 64)),
        ("v", 20, (8, 20)),
        ("qk", 6, (6,)),
        ("heads", 6, (1, 3, 6)),
        ("heads", 1, (1,)),
        ("mlp", 0, (0,)),
    ],
)
def test_grids(kind, size, grid):
    assert grid_of(Dimension("x", kind, size, None, (), False)) == grid
    assert grid_of(Dimension("x", kind, size, None, (), True)) == (size,)


@pytest.mark.parametrize(("channels", "grid"), [(1, (8, 16)), (4, (4, 8, 16)), (6, (4, 8, 16)), (8, (4, 8, 16))])
def test_groups_go_so_that_channels_are_multiples(channels, grid):
    groups = Dimension("neck", "channels", 16, None, (), False, channels=channels)
    assert grid_of(groups) == grid
    assert all(n * channels % STEP == 0 for n in grid)


# --- allocation ---------------------------------------------------------------------------------------------------


@given(
    backbone=st.sampled_from(FAMILIES),
    seed=st.integers(0, 100),
    latency=st.floats(0.65, 1.0),
    macs=st.none() | st.floats(0.6, 1.0),
    realised=st.floats(0.8, 1.0),
)
def test_the_bound_is_never_exceeded(backbone, seed, latency, macs, realised):
    latencies = by_hand(backbone).tightened(realised)
    plan = allocate(random_scores(backbone, seed), Budget(latency=latency, macs=macs), latencies=latencies)
    assert latencies.milliseconds(plan.sizes) <= latency * latencies.dense_ms + 1e-6
    costs = PlanCosts(plan.space)
    used = costs.of(np.array([plan.sizes[n] for n in costs.names]))
    assert macs is None or used[1] <= macs * costs.dense[1]
    for name, dimension in plan.space.dimensions.items():
        if dimension.kind in ("qk", "v", "mlp"):
            assert plan.sizes[name] % STEP == 0 or plan.sizes[name] == dimension.size


@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_the_budget_is_used_and_more_of_it_keeps_more(backbone):
    latencies, scores = by_hand(backbone), random_scores(backbone)
    times = []
    for share in (0.7, 0.8, 0.9, 1.0):
        sizes = allocate(scores, Budget(latency=share), latencies=latencies).sizes
        times.append(latencies.milliseconds(sizes) / latencies.dense_ms)
        for name, dimension in latencies.space.dimensions.items():
            step = dimension.step(STEP)
            larger = min(dimension.size, (sizes[name] // step + 1) * step)
            if larger > sizes[name]:  # nothing more would have fitted
                assert latencies.milliseconds(sizes | {name: larger}) > share * latencies.dense_ms
    assert times == sorted(times) and times[0] < 0.7 + 1e-9 and sizes == latencies.space.sizes


def test_layers_that_save_no_time_stay():
    latencies = by_hand(VIT_TINY)
    lazy = [replace(t, milliseconds=np.full(np.shape(t.milliseconds), 0.3).tolist()) for t in latencies.tables[:2]]
    latencies = replace(latencies, tables=(*lazy, *latencies.tables[2:]))
    plan = allocate(random_scores(VIT_TINY), Budget(latency=0.85), latencies=latencies)
    assert {n: s for n, s in plan.sizes.items() if n.endswith(".0")} == {
        n: s for n, s in plan.space.sizes.items() if n.endswith(".0")
    }
    assert plan.sizes != plan.space.sizes


def test_without_latencies_and_with_width(refused):
    scores = random_scores(VIT_TINY)
    with refused("latency='20ms'", "measure_layers"):
        allocate(scores, Budget(latency="20ms"))
    with refused("the whole embed alone", "sidt.align"):
        allocate(scores, Budget(latency=0.8), kinds=("mlp", "width"), latencies=by_hand(VIT_TINY))
    with refused("smallest reachable latency"):
        allocate(scores, Budget(latency=0.01), latencies=by_hand(VIT_TINY))
    # Without a bound on it, the latency changes nothing.
    plans = [allocate(scores, Budget(macs=0.7), latencies=latencies) for latencies in (None, by_hand(VIT_TINY))]
    assert plans[0].sizes == plans[1].sizes


def test_a_search_keeps_to_the_latency():
    model, _ = dense(VIT_TINY)
    latencies, scores = by_hand(VIT_TINY), random_scores(VIT_TINY)
    seen = []

    def judge(small):
        seen.append(latencies.milliseconds(small.sidt_plan.sizes))
        return np.array([seen[-1]])

    found = search(model, scores, Budget(latency=0.8), judge, latencies=latencies, trials=3, progress=False)
    assert len(seen) == 3 and max(seen) <= 0.8 * latencies.dense_ms + 1e-6
    names = {
        search(model, scores, Budget(latency=0.8), judge, latencies=t, trials=1, progress=False).study.study_name
        for t in (latencies, latencies.tightened(0.9), latencies)
    }
    assert found.study.study_name in names and len(names) == 2  # other tables, another study


# --- files --------------------------------------------------------------------------------------------------------


def test_saved_tables_come_back(tmp_path):
    latencies = measured(SWIN).tightened(0.9)
    latencies.save(tmp_path / "t.json")
    loaded = load_latencies(tmp_path / "t.json", latencies.space)
    assert loaded.to_json() == latencies.to_json() and loaded.digest() == latencies.digest()
    plan = random_plan(latencies.space, 1, INNER_KINDS)
    assert loaded.milliseconds(plan.sizes) == latencies.milliseconds(plan.sizes)
    assert not differences(loaded.where, latencies.where)
    assert differences(loaded.where, latencies.where | {"threads": 64}) == "threads 1 there, 64 here"


def test_wrong_files(tmp_path, refused):
    path = tmp_path / "t.json"
    by_hand(VIT_TINY).save(path)
    with refused("another model", "VisionTransformer"):
        load_latencies(path, dense(SWIN)[1])
    data = json.loads(path.read_text())
    for key, value in {"tables": [{}], "dense_ms": "soon", "realised": None}.items():
        path.write_text(json.dumps(data | {key: value}))
        with refused("damaged", "measure again"):
            load_latencies(path, dense(VIT_TINY)[1])
    path.write_text("[]")
    with refused("holds no layer latencies"):
        load_latencies(path, dense(VIT_TINY)[1])
