"""What was made of something else than is there now, and what options leave behind in a run."""

import json
import shutil

import pytest
import yaml


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    return tmp_path / "r"


@pytest.mark.slow
def test_every_later_step_names_the_step_to_run_again(copy, sidt_command, mistake):
    before = (copy / "evaluation.json").read_bytes()
    assert sidt_command("train", copy, "--set", "train.epochs=2")[0] == 0
    for step in ("search", "slice", "finetune", "evaluate", "report"):
        mistake(step, copy, says=[copy / "base", "another dense model", copy / "dense", f"`sidt score {copy}`"])
    assert (copy / "evaluation.json").read_bytes() == before
    stale = {
        "score": ("search", "search/plan.json"),
        "search": ("slice", "sliced"),
        "slice": ("finetune", "model.safetensors"),
        "finetune": (None, ""),
        "evaluate": (None, ""),
    }
    for step, (following, place) in stale.items():
        code, _, err = sidt_command(step, copy)
        assert code == 0, err
        for judged in ("evaluate", "report") if following else ():
            mistake(judged, copy, says=[copy / place, f"`sidt {following} {copy}`"])
    assert sidt_command("report", copy)[0] == 0


def test_an_evaluation_of_other_models_is_not_reported(copy, sidt_command, mistake):
    assert sidt_command("finetune", copy, "--set", "finetune.epochs=2")[0] == 0
    mistake("report", copy, says=["evaluation.json", "another fine-tuned model", f"`sidt evaluate {copy}`"])


def test_a_trained_model_has_its_own_trials(copy, sidt_command):
    """Random scores are the same for both, and so is all else that the study is named by."""
    random = ("--set", "score.method=random", "--set", "repair=false")
    values = []
    for epochs in (1, 2):
        for step in ("train", "score", "search"):
            code, _, err = sidt_command(step, copy, *random, "--set", f"train.epochs={epochs}")
            assert code == 0, err
        values.append(json.loads((copy / "search" / "search.json").read_text())["values"])
    assert len(values[0]) == len(values[1]) and not set(values[0]) & set(values[1])


def test_runs_of_before_the_record_go_on(copy, sidt_command):
    shutil.rmtree(copy / "provenance")
    assert sidt_command("report", copy)[0] == 0
    code, _, err = sidt_command("evaluate", copy)
    assert code == 0, err


def test_a_search_leaves_its_plan_whatever_happens_to_its_last_check(copy, sidt_command, monkeypatch):
    from sidt.runs import pipeline

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "gain_on", stop)
    assert sidt_command("search", copy, "--budget.params", 0.8)[0] == 130
    found = json.loads((copy / "search" / "search.json").read_text())
    assert found["budget"] == "params=0.8" and found["gain"] is None
    for step in ("slice", "finetune", "evaluate", "report"):
        code, _, err = sidt_command(step, copy)
        assert code == 0, err
    assert "was not judged" in (copy / "report.md").read_text()


def test_options_of_a_call_do_not_stay_and_what_the_run_is_does(config, copy, sidt_command, tmp_path):
    def kept(folder=copy):
        return yaml.safe_load((folder / "config.yaml").read_text())

    before = kept()
    assert before["device"] == "auto"
    code, out, err = sidt_command("search", copy, "--trials", 4, "--timeout", 99, "--device", "cpu")
    assert code == 0 and "after 4 trials" in out, err
    assert sidt_command("evaluate", copy, "--device", "cpu")[0] in (0, 2)
    assert kept() == before
    code, _, err = sidt_command("search", copy, "--budget.params", 0.7, "--seed", 1, "--set", "search.trials=2")
    assert code == 0, err
    changed = kept()
    assert (changed["budget"]["params"], changed["seed"], changed["search"]["trials"]) == (0.7, 1, 2)
    assert sidt_command("train", config, "--out", tmp_path / "new", "--device", "cpu", "--set", "seed=5")[0] == 0
    assert kept(tmp_path / "new")["device"] == "auto" and kept(tmp_path / "new")["seed"] == 5
