"""The command line as a user types it: every step on a tiny model, and every mistake on one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import sidt
from sidt.cli import commands as cli

TINY = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "args": {
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 10,
        },
    },
    "data": {"name": "digits", "image_size": 16},
    "train": {"epochs": 1},
    "score": {"images": 64},
    "budget": {"params": 0.6},
    "search": {"trials": 3, "images": 64},
    "finetune": {"epochs": 1},
}


@pytest.fixture
def sidt_command(monkeypatch, capsys):
    """``sidt_command("spaces") -> exit code, stdout, stderr``."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["sidt", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def mistake(sidt_command):
    """``mistake("search", "x", says=["x"])``: exit code 2, one line on stderr that says the words."""

    def check(*arguments, says=()):
        code, _, err = sidt_command(*arguments)
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("sidt: ")]
        assert code == 2 and len(lines) == 1 and err.rstrip().endswith(lines[0]), err
        assert all(str(word) in lines[0] for word in says), lines[0]

    return check


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run folder made step by step, each by its own command in its own process."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for step in ("train", "score", "search", "slice", "finetune", "evaluate", "report"):
        source = [config, "--out", folder] if step == "train" else [folder]
        done = subprocess.run(
            [sys.executable, "-m", "sidt", step, *source], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert done.stdout.count("held-out images, about") == (step == "search")  # what it will cost, once
    return folder


def test_the_steps_leave_a_whole_run_folder(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "config.yaml", "config.json", "plan.json", "model.safetensors", "scores.safetensors", "study.db",
        "search", "evaluation.json", "report.md", "kept.png", "search.png", "dense", "base", "sliced",
    }  # fmt: skip
    assert not [n for n in names if n.startswith(".")]
    for picture in ("kept.png", "search.png"):
        assert Image.open(finished / picture).size[0] > 300
    found = json.loads((finished / "search" / "search.json").read_text())
    assert found["objective"] == "loss" and all(found[name] < 0 for name in ("dense", "plain", "best"))
    rows = json.loads((finished / "evaluation.json").read_text())
    assert list(rows) == ["dense", "sliced", "fine-tuned"]
    share = rows["fine-tuned"]["params"] / rows["dense"]["params"]
    assert 0.6 * 0.99 <= share <= 0.6
    assert str(f"{rows['dense']['params']:,}") in (finished / "report.md").read_text()
    model = sidt.load(finished)
    assert sum(p.numel() for p in model.parameters()) == rows["fine-tuned"]["params"]
    sliced, tuned = sidt.load(finished / "sliced").state_dict(), model.state_dict()
    assert not torch.equal(sliced["head.weight"], tuned["head.weight"])


def test_steps_are_rerunnable_and_resume(finished, sidt_command):
    before = (finished / "search" / "plan.json").read_bytes()
    assert before == (finished / "plan.json").read_bytes() == (finished / "sliced" / "plan.json").read_bytes()
    code, out, _ = sidt_command("search", finished)
    assert code == 0 and "after 3 trials" in out
    assert (finished / "search" / "plan.json").read_bytes() == before
    code, out, _ = sidt_command("search", finished, "--trials", 4)
    assert code == 0 and "after 4 trials" in out
    code, _, err = sidt_command("finetune", finished)
    assert code == 0, err


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
    assert code == 2 and "of another plan" in err  # what was fine-tuned is another point of the curve
    for step in ("finetune", "evaluate", "report"):
        assert sidt_command(step, tmp_path / "r")[0] == 0
    rows = read("evaluation.json")
    assert 0.98 * 0.9 <= rows["sliced"]["params"] / rows["dense"]["params"] <= 0.9
    assert ", sliced at params=0.9 of the curve" in (tmp_path / "r" / "report.md").read_text().splitlines()[0]
    for share in ("0", "1.5", "nan"):
        code, _, err = sidt_command("slice", tmp_path / "r", "--at", share)
        assert code == 2 and "not on the curve" in err and err.count("\n") == 1
    (tmp_path / "r" / "search" / "search.json").write_text(json.dumps(read("search/search.json") | {"front": [{}]}))
    code, _, err = sidt_command("slice", tmp_path / "r", "--at", 0.9)
    assert code == 2 and "search again" in err and err.count("\n") == 1


def test_a_run_in_steps(config, tmp_path, sidt_command, mistake):
    run = tmp_path / "r"
    code, out, err = sidt_command("run", config, "--out", run, "--set", "steps=2", "--set", "budget.params=0.4")
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


def test_a_run_without_a_curve_has_one_point(finished, sidt_command):
    code, _, err = sidt_command("slice", finished, "--at", 0.5)
    assert code == 2 and "--pareto" in err and err.count("\n") == 1


def test_complexity_of_a_model(sidt_command):
    code, out, _ = sidt_command("complexity", "deit_small_patch16_224", "--format", "json")
    report = json.loads(out)
    assert code == 0
    assert (report["params"], report["macs"]) == (22_050_664, 4_598_882_304)
    assert sum(r["params"] for r in report["rows"]) == report["params"]
    for style in ("table", "md", "latex"):
        assert (
            "22,050,664" in sidt_command("complexity", "deit_small_patch16_224", "--by", "kind", "--format", style)[1]
        )
    out = sidt_command("complexity", "deit_small_patch16_224", "--by", "module", "--format", "csv")[1]
    rows = [line.split(",") for line in out.strip().splitlines()[1:]]
    assert sum(int(r[1]) for r in rows if r[0] != "total") == 22_050_664


def test_complexity_of_a_run_a_config_and_a_plan(finished, config, sidt_command):
    rows = json.loads((finished / "evaluation.json").read_text())
    report = json.loads(sidt_command("complexity", finished, "--format", "json")[1])
    assert report["params"] < report["dense"]["params"] == rows["dense"]["params"]
    with_plan = sidt_command("complexity", config, "--plan", finished / "search" / "plan.json", "--format", "json")[1]
    assert json.loads(with_plan) == report
    assert json.loads(sidt_command("complexity", config, "--format", "json")[1])["params"] == rows["dense"]["params"]
    assert (
        json.loads(sidt_command("complexity", finished / "dense", "--format", "json")[1])["params"]
        == rows["dense"]["params"]
    )


def test_input_size_changes_macs_and_not_params(sidt_command):
    small, large = (
        json.loads(sidt_command("complexity", "pvt_v2_b0", "--input", size, "--format", "json")[1])
        for size in ("3x64x64", "3x128x128")
    )
    assert small["params"] == large["params"] and small["macs"] < large["macs"] / 3


def test_spaces(sidt_command):
    code, out, _ = sidt_command("spaces")
    assert code == 0 and all(name in out for name in ("vit", "swin", "swin_v2", "pvt_v2"))
    code, out, _ = sidt_command("spaces", "vit_tiny_patch16_224")
    assert code == 0 and "hidden.11" in out and "3 x 64" in out
    code, out, _ = sidt_command("spaces", "vit_small_patch14_dinov2")  # has no head, and gets one
    assert code == 0 and "embed: can be rotated" in out


def test_mistakes_of_arguments(mistake, config, tmp_path):
    mistake("serach", says=["serach"])
    mistake("search", says=["Missing argument"])
    mistake("search", tmp_path / "nowhere.yaml", says=["nowhere.yaml", "neither"])
    mistake("search", tmp_path, says=["no run folder"])
    mistake("spaces", "vit_enormous", says=["vit_enormous"])
    mistake("spaces", "resnet18", says=["no search space", "ResNet", "search_spaces/"])
    mistake("complexity", "vit_tiny_patch16_224", "--input", "224", says=["224"])
    mistake("complexity", "vit_tiny_patch16_224", "--by", "layer", says=["layer"])
    mistake("complexity", "vit_tiny_patch16_224", "--input", "3x100x100", says=["3x100x100"])


def test_mistakes_of_order(mistake, config, tmp_path):
    for step, missing in {
        "score": "train",
        "search": "train",
        "slice": "train",
        "finetune": "slice",
        "evaluate": "train",
    }.items():
        mistake(step, config, "--out", tmp_path / step, says=[f"sidt {missing}"])


@pytest.mark.parametrize("value", ["0", "-0.5", "1.5", "nan", "x"])
def test_mistakes_of_budgets(mistake, config, tmp_path, value):
    mistake("search", config, "--out", tmp_path / "b", f"--budget.params={value}", says=["budget params"])
    assert not (tmp_path / "b").exists()


def test_a_budget_that_cannot_be_met(mistake, finished):
    before = {p: p.read_bytes() for p in finished.rglob("*.[jy]*")}
    assert len(before) > 8
    mistake("search", finished, "--budget.params", "0.001", says=["smallest reachable params"])
    assert {p: p.read_bytes() for p in finished.rglob("*.[jy]*")} == before


def test_mistakes_of_data_and_device(mistake, config, tmp_path):
    out = ["--out", tmp_path / "d"]
    mistake(
        "train",
        config,
        *out,
        "--set",
        "data.name=folder",
        "--set",
        f"data.root={tmp_path / 'none'}",
        says=["none"],
    )
    mistake("train", config, *out, "--set", "model.args.num_classes=7", says=["7", "10"])
    mistake("train", config, *out, "--set", "model.name=vit_enormous", says=["vit_enormous"])
    if not torch.cuda.is_available():
        mistake("train", config, *out, "--device", "cuda", says=["cuda"])
    mistake("train", config, *out, "--set", "train=null", says=["no weights"])
    assert not (tmp_path / "d" / "dense").exists()


def test_empty_image_folder(mistake, config, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
    mistake(
        "train",
        config,
        "--out",
        tmp_path / "e",
        "--set",
        "data.name=folder",
        "--set",
        f"data.root={tmp_path / 'images'}",
        says=["images"],
    )


def test_an_image_folder_trains(config, tmp_path, sidt_command):
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for shade, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (20, 20, 3)) + 150 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    settings = [
        "data.name=folder",
        f"data.root={tmp_path / 'images'}",
        "data.holdout=0.2",
        "model.args.num_classes=2",
    ]
    sets = [part for s in settings for part in ("--set", s)]
    code, _, err = sidt_command("train", config, "--out", tmp_path / "f", *sets)
    assert code == 0, err


def test_output_folder_that_cannot_be_made(mistake, config, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    mistake("train", config, "--out", tmp_path / "file" / "run", says=["cannot write", "file"])


def test_plan_of_another_model(mistake, finished, tmp_path):
    plan = json.loads((finished / "plan.json").read_text())
    plan["keep"]["hidden.0"][0] = 4000
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    mistake("complexity", finished, "--plan", tmp_path / "plan.json", says=["hidden.0", "4000"])
    mistake("complexity", "vit_tiny_patch16_224", "--plan", finished / "plan.json", says=["another model"])


def test_ctrl_c_keeps_finished_trials(finished, sidt_command, monkeypatch):
    import optuna

    from sidt.runs import pipeline

    calls = []
    real, parts = pipeline.log_likelihood, 8

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) == 2 * parts + 1:  # the dense model, the first trial, and now the second
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(pipeline, "log_likelihood", stops)
    code, _, err = sidt_command("search", finished, "--budget.params", "0.7", "--trials", 5)
    assert code == 130 and "same command goes on" in err
    monkeypatch.setattr(pipeline, "log_likelihood", real)
    code, out, _ = sidt_command("search", finished, "--budget.params", "0.7", "--trials", 5)
    assert code == 0 and "after 5 trials" in out
    # What was made from the plan before is whole, and is not taken for the result of this one.
    assert sidt.load(finished)
    code, _, err = sidt_command("report", finished)
    assert code == 2 and "sidt slice" in err
    summaries = optuna.get_all_study_summaries(f"sqlite:///{finished / 'study.db'}")
    assert max(s.n_trials for s in summaries) == 6  # five finished, one stopped


def test_a_run_measures_and_reads_once(sidt_command, tmp_path, monkeypatch):
    from sidt.runs import base, images

    calls = []

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or real(*a, **k))

    counted(base, "measure_moments")
    counted(images, "load_data")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"data": {**TINY["data"], "seed": 7}}))
    code, _, err = sidt_command("run", tmp_path / "tiny.yaml", "--out", tmp_path / "run")
    assert code == 0, err
    assert sorted(calls) == ["load_data", "measure_moments"]
    before = (tmp_path / "run" / "sliced" / "model.safetensors").read_bytes()
    code, _, err = sidt_command("slice", tmp_path / "run")
    assert code == 0 and calls.count("measure_moments") == 1
    assert "repair of the width" not in err, "a rotated width is repaired from the moments, not by further passes"
    assert (tmp_path / "run" / "sliced" / "model.safetensors").read_bytes() == before
    code, _, _ = sidt_command("slice", tmp_path / "run", "--set", "score.images=32")
    assert code == 0 and calls.count("measure_moments") == 2, "moments of other images are not taken for these"
    assert (tmp_path / "run" / "sliced" / "model.safetensors").read_bytes() != before


def test_configs_and_spaces_ship_with_the_package():
    from importlib import resources

    assert (resources.files("sidt.configs") / "classification" / "digits_vit.yaml").is_file()
    assert Path(str(resources.files("sidt.search_spaces"))).joinpath("vit.yaml").is_file()
