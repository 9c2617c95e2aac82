"""Latencies: tables say what was measured, plans keep to them, and files tell where they are from."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import yaml
from backbones import BACKBONES, PVT, SWIN, VIT_TINY, dense, random_plan
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sidt import Budget, allocate, importance, slice_model
from sidt.allocation import Rules
from sidt.cli import cli
from sidt.clock import whereabouts
from sidt.complexity import PlanCosts
from sidt.errors import InputError
from sidt.families import INNER_KINDS
from sidt.latency import STEP, LayerLatencies, LayerTable, TimedPlanCosts, differences, grid_of, load_latencies
from sidt.report import latency_text
from sidt.study import search
from sidt.timing import (
    LayerTime,
    compare_layers,
    first_units,
    fit_latency,
    latencies_for,
    macs_of,
    measure_layers,
    time_plans,
    timed_layers,
)

FAMILIES = (VIT_TINY, SWIN, PVT)
WHERE = {"machine": "abacus", "device": "cpu", "threads": 1, "batch": 1}


@cache
def by_hand(backbone, seed=0) -> LayerLatencies:
    """Tables without a clock: time grows with the sizes, unevenly, and every layer has a table of its own."""
    model, space = dense(backbone)
    rng = np.random.default_rng(seed)
    tables = []
    for name, (_, dims) in timed_layers(model, space, nn.Module.__call__).items():
        grid = tuple(grid_of(space.dimensions[d].kind, space.sizes[d]) for d in dims)
        times = rng.uniform(0.05, 0.2, [len(sizes) for sizes in grid])
        for axis in range(times.ndim):
            times = times.cumsum(axis=axis)
        tables.append(LayerTable({name: dims}, grid, times.tolist()))
    dense_ms = 1.5 * sum(np.max(t.milliseconds) for t in tables)
    return LayerLatencies(space, WHERE, dense_ms, tuple(tables))


@cache
def measured(backbone) -> LayerLatencies:
    return measure_layers(*dense(backbone), rounds=1, progress=False)


def random_scores(backbone, seed=0):
    model, space = dense(backbone)
    return importance.random(model, seed=seed, space=space)


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
    sizes, hidden = latencies.space.sizes, grid_of("mlp", 768)
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
    blocks = len(space.blocks())
    assert len(layers) == 2 * blocks  # attention and MLP apart


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
    assert grid_of(kind, size) == grid
    assert grid_of(kind, size, fixed=True) == (size,)


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
            step = 1 if dimension.kind == "heads" else STEP
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
    with refused("width"):
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


# --- the clock against the table ----------------------------------------------------------------------------------


def fake_times(monkeypatch, left):
    """Every plan but the dense one takes ``left(plan)`` of the dense model's time."""

    def times(model, plans, layers, *, rounds, **_):
        shares = [1.0 if p.sizes == p.space.sizes else left(p) for p in plans]
        return np.broadcast_to(np.array(shares)[None, :, None, None], (rounds, len(plans), 2, 1 + len(layers)))

    monkeypatch.setattr("sidt.timing.time_plans", times)


def test_fitting_tightens_until_the_clock_agrees(monkeypatch):
    """The clock finds only 80 % of the savings that the table promises."""
    model, latencies, scores = dense(VIT_TINY)[0], by_hand(VIT_TINY), random_scores(VIT_TINY)

    def real(plan):
        return 1 - 0.8 * (1 - latencies.milliseconds(plan.sizes) / latencies.dense_ms)

    fake_times(monkeypatch, real)
    fitted = fit_latency(model, scores, Budget(latency=0.75), latencies, progress=False)
    assert fitted.realised == pytest.approx(0.8, abs=1e-3)
    assert real(allocate(scores, Budget(latency=0.75), latencies=fitted)) <= 0.75 + 1e-6
    assert real(allocate(scores, Budget(latency=0.75), latencies=latencies)) > 0.75


def test_fitting_never_loosens(monkeypatch):
    latencies = by_hand(VIT_TINY)
    fake_times(monkeypatch, lambda plan: 0.1)
    budget = Budget(latency=f"{0.75 * latencies.dense_ms}ms")
    said = []
    fitted = fit_latency(
        dense(VIT_TINY)[0], random_scores(VIT_TINY), budget, latencies, say=said.append, progress=False
    )
    assert fitted == latencies and len(said) == 1


def test_a_model_that_gets_no_faster_is_refused(monkeypatch, refused):
    fake_times(monkeypatch, lambda plan: 1.0)
    with refused("smallest reachable latency"):
        fit_latency(dense(VIT_TINY)[0], random_scores(VIT_TINY), Budget(latency=0.8), by_hand(VIT_TINY), progress=False)


def test_a_run_measures_once_and_says_what_is_from_elsewhere(tmp_path, monkeypatch):
    model, _ = dense(VIT_TINY)
    scores, budget, said = random_scores(VIT_TINY), Budget(latency=0.9), []
    assert latencies_for(tmp_path, model, scores, Budget(macs=0.5), Rules(), said.append) is None
    measures = []

    def measure(model, space, **_):
        measures.append(space)
        return replace(by_hand(VIT_TINY), where=whereabouts(model, space, 1))

    monkeypatch.setattr("sidt.timing.measure_layers", measure)
    fake_times(monkeypatch, lambda plan: 0.95)
    first = latencies_for(tmp_path, model, scores, budget, Rules(), said.append)
    fake_times(monkeypatch, lambda plan: 0.5)
    again = latencies_for(tmp_path, model, scores, budget, Rules(), said.append)
    assert len(measures) == 1 and first.digest() == again.digest() and first.realised < 1
    assert latencies_for(tmp_path, model, scores, Budget(latency=0.8), Rules(), said.append).realised == 1
    assert not [text for text in said if "elsewhere" in text]

    by_hand(VIT_TINY).save(tmp_path / "layers.json")
    taken = latencies_for(tmp_path, model, scores, budget, Rules(), said.append)
    assert taken.to_json() == by_hand(VIT_TINY).to_json()
    assert "elsewhere" in said[-1] and "abacus there" in said[-1]


def clock_of_macs(monkeypatch):
    """A clock for which every layer takes as long as it has multiply-adds."""

    def times(model, plans, layers, *, rounds, **_):
        *inside, _, total = np.array([macs_of(p.space, layers, p.sizes) for p in plans], dtype=float).T
        rows = np.stack([total, *inside], axis=-1) / 1e6
        return np.broadcast_to(rows[None, :, None], (rounds, len(plans), 2, 1 + len(layers)))

    monkeypatch.setattr("sidt.timing.time_plans", times)


def test_a_run_is_searched_within_a_latency(tmp_path, monkeypatch):
    """By the command line: layers are timed once, the same command goes on, and the layers of the plan are shown."""
    clock_of_macs(monkeypatch)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    config, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    tree = {
        "model": {"name": "vit_tiny_patch16_224", "args": args},
        "data": {"name": "digits", "image_size": 16},
        "train": {"epochs": 1},
        "score": {"method": "magnitude"},
        "budget": {"params": 0.9},
        "search": {"images": 16},
        "device": "cpu",
    }
    config.write_text(yaml.safe_dump(tree))

    def sidt(*words):
        result = CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=False, standalone_mode=False)
        assert result.exit_code == 0, result.output
        return result.output

    sidt("train", config, "--out", folder)
    sidt("score", folder)
    first = sidt("search", folder, "--budget.latency", "0.7", "--trials", "2")
    assert "sizes of 4 layers" in first and "by the layer table" in first
    assert len(list((folder / "latency").iterdir())) == 2
    again = sidt("search", folder, "--trials", "3")
    assert "sizes of 4 layers" not in again and "after 3 trials" in again
    assert json.loads((folder / "search" / "search.json").read_text())["budget"] == "latency=0.7"
    shown = sidt("complexity", folder, "--latency")
    assert "blocks.1.attn" in shown and "time left" in shown and "device cpu" in shown
    with pytest.raises(InputError, match="--plan"):
        sidt("complexity", "vit_tiny_patch16_224", "--latency")


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


# --- which layers pay ---------------------------------------------------------------------------------------------


def test_a_comparison_has_every_layer_and_adds_up():
    model, space = dense(VIT_TINY)
    plan = random_plan(space, 0, ("mlp",))
    rows = {row.name: row for row in compare_layers(model, plan, rounds=2, progress=False)}
    assert list(rows) == [*timed_layers(model, space, nn.Module.__call__), "(rest)", "(model)"]
    assert rows["blocks.0.attn"].macs == rows["(rest)"].macs == 1
    assert rows["blocks.0.mlp"].macs == pytest.approx(plan.sizes["hidden.0"] / space.sizes["hidden.0"])
    costs = PlanCosts(space)
    used = costs.of(np.array([plan.sizes[n] for n in costs.names]))
    assert rows["(model)"].macs == pytest.approx(used[1] / costs.dense[1])


def test_the_table_names_what_does_not_pay():
    rows = [
        LayerTime("blocks.0.attn", 2.0, 1.9, 0.95, 0.5, False),
        LayerTime("blocks.0.mlp", 4.0, 2.0, 0.5, 0.5, True),
        LayerTime("(rest)", 1.0, 1.2, 1.2, 1.0, False),
    ]
    text = latency_text(rows, WHERE)
    assert "1 layers do not pay: blocks.0.attn." in text and "machine abacus" in text and "95.0%" in text
    assert "Every layer pays" in latency_text(rows[1:], WHERE)
    assert json.loads(latency_text(rows, WHERE, "json"))["layers"][1]["name"] == "blocks.0.mlp"


# --- attention on CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(24, 40), (40, 24), (13, 5)])
def test_attention_of_unequal_sizes_is_exact(sizes):
    """Zeros fill up the smaller of q/k and v: outputs and gradients are those of attention written out."""
    from sidt.attention import attend

    qk, v = sizes
    q, k, w = (torch.randn(2, 3, 17, size, dtype=torch.float64, requires_grad=True) for size in (qk, qk, v))
    for mask in (None, torch.randn(1, 3, 17, 17, dtype=torch.float64)):
        expected = (q @ k.transpose(-2, -1) * 0.3 + (0 if mask is None else mask)).softmax(-1) @ w
        seen = attend(q, k, w, mask, scale=0.3)
        torch.testing.assert_close(seen, expected)
        weight = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad((out * weight).sum(), (q, k, w)) for out in (seen, expected))
        torch.testing.assert_close(ours, theirs)


def test_attention_of_unequal_sizes_is_fused_on_cpu():
    """The kernel for CPU is called, which takes one size only."""
    from torch.profiler import ProfilerActivity, profile

    model, space = dense(VIT_TINY)
    small = slice_model(model, first_units(space, {"qk.0": 24, "v.0": 40, "qk.1": 40, "v.1": 8}))
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        small(torch.randn(1, *space.trace.input_size))
    names = [event.key for event in seen.key_averages() for _ in range(event.count)]
    assert sum("flash_attention_for_cpu" in name for name in names) == 2
