"""Runs that search a curve, and runs that reach their budget in steps."""

import json

import pytest
import torch

import sidt


def test_run_and_pareto(config, tmp_path, sidt_command):
    changes = ("search.pareto=true", "search.objective=top1", "repair=false", "finetune.epochs=0")
    code, out, err = sidt_command("run", config, "--out", tmp_path / "r", *(f"--set={change}" for change in changes))
    assert code == 0, err
    dense, base = (sidt.load(tmp_path / "r" / name).state_dict() for name in ("dense", "base"))
    assert all(torch.equal(dense[name], tensor) for name, tensor in base.items())  # nothing was aligned
    assert "report ->" in out

    def read(name):
        return json.loads((tmp_path / "r" / name).read_text())

    front = read("search/search.json")["front"]
    assert front and {"value", "share", "params", "macs", "knobs"} == set(front[0])
    along = read("search/search.json")["along"]
    assert len(along) == 3 and any(plain for _, _, plain in along)
    assert {(p["share"], p["value"]) for p in front} <= {(share, value) for share, value, _ in along}
    assert "Where the curve bends" in (tmp_path / "r" / "report.md").read_text()
    assert sidt_command("slice", tmp_path / "r", "--at", 0.9)[0] == 0
    code, _, err = sidt_command("evaluate", tmp_path / "r")
    assert code == 2 and "another sliced model" in err  # what was fine-tuned is another point of the curve
    for step in ("finetune", "evaluate", "report"):
        assert sidt_command(step, tmp_path / "r")[0] == 0
    rows = read("evaluation.json")
    assert 0.98 * 0.9 <= rows["sliced"]["params"] / rows["dense"]["params"] <= 0.9
    assert ", sliced at params=0.9 of the curve" in (tmp_path / "r" / "report.md").read_text().splitlines()[0]
    for share in ("0", "1.5", "nan"):
        code, _, err = sidt_command("slice", tmp_path / "r", "--at", share)
        assert code == 2 and "not on the curve" in err and err.count("\n") == 1
    assert sidt_command("score", tmp_path / "r", "--set", "steps=2", "--set", "search.pareto=false")[0] == 0
    code, _, err = sidt_command("slice", tmp_path / "r", "--at", 0.9)
    assert code == 2 and "another scored model" in err and "sidt search" in err  # the curve is of another base
    assert sidt_command("score", tmp_path / "r", "--set", "steps=1", "--set", "search.pareto=true")[0] == 0
    (tmp_path / "r" / "search" / "search.json").write_text(json.dumps(read("search/search.json") | {"front": [{}]}))
    code, _, err = sidt_command("slice", tmp_path / "r", "--at", 0.9)
    assert code == 2 and "search again" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_run_in_steps(config, tmp_path, sidt_command, mistake):
    run = tmp_path / "r"
    code, out, err = sidt_command("run", config, "--out", run, "--set", "steps=2", "--budget.params", 0.4)
    assert code == 0, err
    assert "in 2 steps" in out
    base = sidt.load(run / "base")
    sizes, plan = base.sidt_plan.sizes, json.loads((run / "search" / "plan.json").read_text())
    assert sizes["embed"] < plan["dense"]["embed"] == 24
    assert plan == json.loads((run / "plan.json").read_text()) == json.loads((run / "sliced" / "plan.json").read_text())
    rows = json.loads((run / "evaluation.json").read_text())
    assert 0.98 * 0.4 <= rows["sliced"]["params"] / rows["dense"]["params"] <= 0.4
    whole = sum(p.numel() for p in sidt.load(run / "dense").parameters())
    assert 0.98 * 0.4**0.5 <= sum(p.numel() for p in base.parameters()) / whole <= 0.4**0.5
    before = (run / "sliced" / "model.safetensors").read_bytes()
    assert sidt_command("search", run)[0] == sidt_command("slice", run)[0] == 0
    assert (run / "sliced" / "model.safetensors").read_bytes() == before
    mistake(
        "search",
        run,
        "--budget.params",
        0.6,
        says=["params=0.4 in 2 steps", "params=0.6", "sidt score", "--set budget.params=0.6"],
    )
    mistake("search", run, "--set", "steps=3", says=["in 2 steps", "in 3", "sidt score"])
    mistake("search", run, "--set", "steps=1", "--pareto", says=["in 2 steps", "sidt score"])
    assert sidt_command("score", run, "--set", "steps=1")[0] == 0
    assert sidt.load(run / "base").state_dict()["head.weight"].shape == (10, 24)
    assert sidt_command("search", run, "--budget.params", 0.6)[0] == 0


@pytest.mark.parametrize("value", [0, 1000, "many"])
def test_mistakes_of_steps(mistake, config, tmp_path, value):
    mistake("score", config, "--out", tmp_path / "r", "--set", f"steps={value}", says=["steps", value])
    mistake(
        "score", config, "--out", tmp_path / "r", "--set", "steps=2", "--set", "search.pareto=true", says=["pareto"]
    )
