"""The command line as a user types it: every step on a tiny model, and every mistake on one line."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import timm
import torch
import yaml
from hub import TOKEN, serving, use
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sidt
from sidt.runs import pipeline


def test_the_steps_leave_a_whole_run_folder(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "config.yaml", "config.json", "plan.json", "model.safetensors", "scores.safetensors", "study.db",
        "search", "evaluation.json", "report.md", "report.html", "answers.json", "kept.png", "search.png",
        "dense", "base", "sliced",
    }  # fmt: skip
    assert not [n for n in names if n.startswith(".")]
    for picture in ("kept.png", "search.png"):
        assert Image.open(finished / picture).size[0] > 300
    found = json.loads((finished / "search" / "search.json").read_text())
    assert found["objective"] == "log-likelihood" and all(found[name] < 0 for name in ("dense", "plain", "best"))
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


@pytest.mark.slow
@pytest.mark.parametrize("budget", [(), ("--budget.latency", "1s")], ids=["at once", "after layers are timed"])
def test_workers_search_together(finished, sidt_command, monkeypatch, tmp_path, budget):
    """The first call of the first worker does nothing, so that what is there afterwards is the other's."""
    folder, calls = tmp_path / "run", []
    shutil.copytree(finished, folder)
    (folder / "study.db").unlink()
    search = pipeline.answer

    def answer(run, asked, latencies):
        calls.append(pipeline.torch.get_num_threads())
        if len(calls) == 1:
            return None
        (study,) = optuna.get_all_study_summaries(f"sqlite:///{folder / 'study.db'}")
        assert study.n_trials >= 4
        return search(run, asked, latencies)

    monkeypatch.setattr(pipeline, "answer", answer)
    code, out, err = sidt_command("search", folder, "--trials", 4, "--workers", 2, *budget)
    assert code == 0 and "after 4 trials" in out, err
    assert len(calls) == 2
    assert "workers: 1" in (folder / "config.yaml").read_text()  # how many is of the one call


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


def test_input_size_changes_macs_and_not_params(complexity):
    small, large = (complexity("pvt_v2_b0", "--input", size) for size in ("3x64x64", "3x128x128"))
    assert small["params"] == large["params"] and small["macs"] < large["macs"] / 3


def test_a_model_is_built_for_the_input_size(complexity):
    found, named = complexity("vit_tiny_patch16_224", "--input", "3x384x384"), complexity("vit_tiny_patch16_384")
    assert found == named and found["input_size"] == [3, 384, 384]
    assert complexity("vit_tiny_patch16_224", "--input", "3x224x224") == complexity("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("deit_tiny_distilled_patch16_224", (1, 32, 48), {"img_size": (32, 48)}),
        ("vit_small_patch14_dinov2", (3, 70, 70), {"img_size": 70}),
        ("swin_tiny_patch4_window7_224", (3, 256, 192), {"img_size": (256, 192)}),
        ("swin_tiny_patch4_window7_224", (1, 64, 64), {"img_size": 64}),
        ("swinv2_tiny_window8_256", (4, 128, 128), {"img_size": 128}),
        ("pvt_v2_b0", (1, 96, 64), {}),
    ],
)
def test_costs_at_an_input_size_are_those_that_are_counted(complexity, name, size, args):
    model = timm.create_model(name, in_chans=size[0], **args).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size))
    found = complexity(name, "--input", "x".join(map(str, size)))
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert found["macs"] == counter.get_total_flops() // 2
    assert found["input_size"] == list(size)


def test_a_model_of_a_folder_is_built_already(finished, config, complexity, mistake):
    for source in (finished, finished / "dense", config):
        assert complexity(source, "--input", "3x16x16") == complexity(source)
        mistake("complexity", source, "--input", "3x32x32", says=["3x32x32", "16"])
        mistake("complexity", source, "--input", "1x16x16", says=["1x16x16"])


def test_latency_at_an_input_size(sidt_command, complexity, tmp_path):
    with torch.device("meta"):
        plan = sidt.DimensionPlan(sidt.space_for(timm.create_model("vit_tiny_patch16_224")), {"hidden.0": [0, 1, 2]})
    plan.save(tmp_path / "plan.json")
    words = ("vit_tiny_patch16_224", "--plan", tmp_path / "plan.json", "--input", "1x32x32", "--format", "json")
    code, out, err = sidt_command("complexity", *words, "--latency")
    assert code == 0, err
    assert json.loads(out)["where"]["input"] == [1, 32, 32]
    assert complexity(*words)["params"] < complexity(*words)["dense"]["params"]


def test_spaces(sidt_command):
    code, out, _ = sidt_command("spaces")
    assert code == 0 and all(name in out for name in ("vit", "swin", "swin_v2", "pvt_v2"))
    code, out, _ = sidt_command("spaces", "vit_tiny_patch16_224")
    assert code == 0 and "hidden.11" in out and "3 x 64" in out
    code, out, _ = sidt_command("spaces", "vit_small_patch14_dinov2")  # has no head, and gets one
    assert code == 0 and "embed: can be rotated" in out


def test_env_says_what_a_bug_report_needs(sidt_command):
    code, out, _ = sidt_command("env")
    assert code == 0
    for words in (("Python", platform.python_version()), ("torch", torch.__version__), ("timm", timm.__version__)):
        assert any(line.split() == list(words) for line in out.splitlines()), words
    assert "processor" in out and "CUDA" in out


def test_push(finished, config, sidt_command, mistake, monkeypatch, tmp_path):
    with serving() as hub:
        use(monkeypatch, hub.url, tmp_path)
        code, out, err = sidt_command("push", finished, "someone/small", "--private")
        assert code == 0 and "fine-tuned model" in out and f"{hub.url}/someone/small" in out
        assert hub.private["someone/small"] and TOKEN not in out + err
        sent = hub.files("someone/small")
        assert set(sent) == {
            "config.json", "plan.json", "model.safetensors", "README.md", "kept.png", "search.png"
        }  # fmt: skip
        rows = json.loads((finished / "evaluation.json").read_text())
        text = sent["README.md"].decode()
        assert f"{rows['fine-tuned']['top1']:.2%}" in text and f"{rows['dense']['params']:,}" in text
        assert "params=0.6" in text and "taylor on 64 images" in text and "![units kept](kept.png)" in text
        assert not any(str(place) in text for place in (finished, config.parent, TOKEN))
        card = yaml.safe_load(text.split("---")[1])
        (result,) = card["model-index"][0]["results"]
        assert result["metrics"][0]["value"] == rows["fine-tuned"]["top1"] and card["library_name"] == "sidt"
        images = torch.randn(2, 3, 16, 16)
        assert torch.equal(sidt.load("hf-hub:someone/small")(images), sidt.load(finished)(images))
        mistake("push", finished, "someone", says=["someone", "OWNER/NAME"])
        mistake("push", tmp_path, "someone/small", says=["no checkpoint"])
        mistake("push", tmp_path / "nowhere", "someone/small", says=["nowhere"])
        monkeypatch.delenv("HF_TOKEN")
        mistake("push", finished, "someone/small", says=["token", "hf auth login"])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    mistake("push", finished, "someone/small", says=["cannot reach the hub"])


def test_mistakes_of_arguments(mistake, config, tmp_path):
    mistake("serach", says=["serach"])
    mistake("search", says=["Missing argument"])
    mistake("search", tmp_path / "nowhere.yaml", says=["nowhere.yaml", "neither"])
    mistake("search", tmp_path, says=["no run folder"])
    mistake("spaces", "vit_enormous", says=["vit_enormous"])
    mistake("spaces", "resnet18", says=["no search space", "ResNet", "--draft", "`sidt spaces` lists"])
    mistake("complexity", "vit_tiny_patch16_224", "--input", "224", says=["224"])
    mistake("complexity", "vit_tiny_patch16_224", "--by", "layer", says=["layer"])
    mistake("complexity", "vit_tiny_patch16_224", "--input", "3x8x8", says=["3x8x8"])
    mistake("complexity", "swin_tiny_patch4_window7_224", "--input", "3x2x2", says=["2"])
    mistake("complexity", "resnet18", "--input", "3x64x64", says=["no search space", "CONTRIBUTING.md"])


def test_names_that_are_no_repository(mistake):
    for name in ("hf-hub:", "hf-hub:a/b/c", "hf-hub:a b"):
        mistake("complexity", name, says=["hf-hub:OWNER/NAME"])


@pytest.mark.parametrize("command", ["complexity", "spaces"])
@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:"])
def test_the_hub_without_a_network(command, prefix):
    """In a process of its own: where the hub is, is read when its library is imported."""
    offline = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-m", "sidt", command, f"{prefix}nobody/nothing"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=offline, timeout=180)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("sidt: cannot reach the hub for nobody/nothing") and done.stderr.count("\n") == 1


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
    from sidt.runs import quality

    calls = []
    real, parts = quality.log_likelihood, quality.PARTS

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) == 2 * parts + 1:  # the dense model, the first trial, and now the second
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(quality, "log_likelihood", stops)
    code, _, err = sidt_command("search", finished, "--budget.params", "0.7", "--trials", 5)
    assert code == 130 and "same command goes on" in err
    monkeypatch.setattr(quality, "log_likelihood", real)
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


def test_a_run_without_a_curve_has_one_point(finished, sidt_command):
    code, _, err = sidt_command("slice", finished, "--at", 0.5)
    assert code == 2 and "--pareto" in err and err.count("\n") == 1


def test_a_long_value_is_not_repeated_whole(sidt_command, tmp_path):
    config = tmp_path / "long.yaml"
    config.write_text(f"model: {{name: vit_tiny_patch16_224}}\ndata: {{name: digits, root: [{'x' * 50_000}]}}\n")
    code, _, err = sidt_command("train", config)
    assert code == 2 and err.startswith(f"sidt: {config}: data.root") and len(err) < 1000 and err.count("\n") == 1
