"""The command line as a user types it: every step on a tiny model, and every mistake on one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import sidt


def test_the_steps_leave_a_whole_run_folder(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "config.yaml", "config.json", "plan.json", "model.safetensors", "scores.safetensors", "study.db",
        "search", "evaluation.json", "answers.json", "report.md", "report.html", "kept.png", "search.png",
        "dense", "base", "sliced",
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


def test_a_run_measures_and_reads_once(sidt_command, tiny, tmp_path, monkeypatch):
    from sidt.runs import base, images

    calls = []

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or real(*a, **k))

    counted(base, "measure_moments")
    counted(images, "load_data")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny | {"data": {**tiny["data"], "seed": 7}}))
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
