"""The clock against the table: plans are made to fit, runs measure once, and layers that do not pay are named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from backbones import VIT_TINY, dense, random_plan
from click.testing import CliRunner
from layer_tables import WHERE, by_hand, random_scores
from torch import nn

from sidt import Budget, allocate
from sidt.allocation.greedy import Rules
from sidt.allocation.paying import LayerTime, compare_layers, macs_of
from sidt.allocation.timing import fit_latency, latencies_for, timed_layers
from sidt.cli.commands import cli
from sidt.cost.clock import whereabouts
from sidt.cost.complexity import PlanCosts
from sidt.errors import InputError
from sidt.report.text import latency_text


def fake_times(monkeypatch, left):
    """Every plan but the dense one takes ``left(plan)`` of the dense model's time."""

    def times(model, plans, layers, *, rounds, **_):
        shares = [1.0 if p.sizes == p.space.sizes else left(p) for p in plans]
        return np.broadcast_to(np.array(shares)[None, :, None, None], (rounds, len(plans), 2, 1 + len(layers)))

    monkeypatch.setattr("sidt.allocation.timing.time_plans", times)


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

    monkeypatch.setattr("sidt.allocation.timing.measure_layers", measure)
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

    monkeypatch.setattr("sidt.allocation.timing.time_plans", times)


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
    assert "sizes of 11 layers" in first and "by the layer table" in first
    assert len(list((folder / "latency").iterdir())) == 2
    again = sidt("search", folder, "--trials", "3")
    assert "sizes of 11 layers" not in again and "after 3 trials" in again
    assert json.loads((folder / "search" / "search.json").read_text())["budget"] == "latency=0.7"
    shown = sidt("complexity", folder, "--latency")
    assert "blocks.1.attn" in shown and "time left" in shown and "device cpu" in shown
    with pytest.raises(InputError, match="--plan"):
        sidt("complexity", "vit_tiny_patch16_224", "--latency")


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
