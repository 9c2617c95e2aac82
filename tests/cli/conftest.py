"""A tiny config, a run folder made of it, and the command line called in this process."""

import json
import subprocess
import sys

import pytest
import yaml
from backbones import random_plan, shake

import sidt
from sidt.cli import commands as cli
from sidt.export.models import create_model

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


@pytest.fixture(scope="module")
def tiny():
    """The values of a config that takes seconds."""
    return TINY


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run that is sliced and not fine-tuned; no trial, no training."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny["model"]
    dense = shake(create_model(config["name"], config["args"])).eval()
    sidt.save(dense, folder / "dense", **config)
    sidt.save(sidt.slice_model(dense, random_plan(sidt.space_for(dense), 0)), folder / "sliced", **config)
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny))
    return folder


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
def complexity(sidt_command):
    """``complexity("pvt_v2_b0", "--input", "3x64x64")``: what the command says, from its JSON."""

    def check(*arguments):
        code, out, err = sidt_command("complexity", *arguments, "--format", "json")
        assert code == 0, err
        return json.loads(out)

    return check


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
    """A run folder made step by step, half of it by one process and the rest by another."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    steps = (
        (["train", config, "--out", folder], ["score"], ["search"]),
        (["slice"], ["finetune"], ["evaluate"], ["report"]),
    )
    for together in steps:
        words = [[str(w) for w in (step if len(step) > 1 else [*step, folder])] for step in together]
        program = (
            f"import sys; from sidt.cli.commands import cli\nfor words in {words!r}: cli(words, standalone_mode=False)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") >= len(together)
        assert done.stdout.count("held-out images, about") == (["search"] in together)  # what it will cost, once
    return folder
