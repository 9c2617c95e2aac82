"""What the README and the site show is what happens: blocks of a page run in order, in a folder of their own.

Python runs; commands of ``sidt`` run unless a word of theirs stands for something (RUN, DIR), and are parsed by click
in any case; a block that names a file in its first line is written to it. ``<!-- slow -->`` before a block makes its
page a slow test, ``<!-- not run: why -->`` leaves the block alone.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import click
import pytest
import yaml
from blocks import PAGES, blocks_of, has_placeholder, sidt_words
from test_imports import ROOT

from sidt.cli.commands import cli

EXTRAS = {"own_detector.md": "mmdet", "detection.md": "mmdet", "huggingface.md": "transformers"}
OTHERS = ("python3 -m pip", "pip", "git clone", "hf auth", "optuna-dashboard", ".uv/bin/uv", ".ci/", "globox")
SHORTER = {  # options that make a long command short; of those that are given twice the last counts
    "sidt demo": "--set train.epochs=1 --set search.trials=2 --set finetune.epochs=1 --set score.images=64",
    "sidt detect digits my_data": "--train 40 --val 10",
    "sidt detect train my_detector.py": "--cfg-options train_cfg.max_epochs=1 --cfg-options train_cfg.val_interval=1",
    "sidt detect search runs/my_detector": "--trials 2 --score-images 8",
    "sidt detect finetune runs/my_detector": "--cfg-options train_cfg.max_epochs=1",
}


def _slow(page: Path):
    slow = any(block.note == "slow" for block in blocks_of(page))
    return pytest.param(page, id=page.stem, marks=pytest.mark.slow if slow else ())


def _parse(words: list[str]) -> None:
    """Have click take the words of a command; nothing is done.

    Raises:
        click.ClickException: a command or an option of it is not there, or a value is none of its choices.
    """
    command: click.Command = cli
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(click.Context(command), words)
        assert found is not None
        command = found
    # Files of search spaces would be read.
    words = [word for i, word in enumerate(words) if "--space" not in (word, words[i - 1] if i else "")]
    command.make_context(command.name, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses(page):
    for block in blocks_of(page):
        assert block.language in ("python", "sh", "yaml", "toml", ""), f"{page.name}:{block.line}"
        for words in block.commands:
            try:
                _parse(words)
            except click.ClickException as error:
                pytest.fail(f"{page.name}:{block.line}: sidt {' '.join(words)}: {error.format_message()}")
        for line in block.lines:
            known = sidt_words(line) is not None or line.startswith((*OTHERS, "python ", "#"))
            assert known, f"{page.name}:{block.line}: {line!r} is a command that no test looks at"


def test_a_wrong_option_is_seen():
    for words in (["shrink", "MODEL", "--image", "DIR"], ["serach"], ["export", "RUN", "--to", "onx"]):
        with pytest.raises(click.ClickException):
            _parse(words)


def test_extras_that_are_installed_exist():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    there = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, groups = set(there["project"]["optional-dependencies"]), set(there["dependency-groups"])
    lines = [line for page in PAGES for block in blocks_of(page) for line in block.lines]
    for line in lines:
        words = line.replace("'", '"').split()
        named = [w.split("[")[1].split("]")[0] for w in words if w.startswith('"sidt[')]
        named += [after for word, after in pairwise(words) if word == "--extra"]
        assert set(named) <= extras, line
        assert {after for word, after in pairwise(words) if word == "--group"} <= groups, line


@pytest.mark.parametrize("page", [_slow(page) for page in PAGES])
def test_a_page_runs(page, tmp_path, monkeypatch):
    need = EXTRAS.get(page.name)
    if need is not None and find_spec(need) is None:
        pytest.skip(f"{page.name} needs {need}, which is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    names = {"__name__": "page"}
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        if block.note == "not run":
            continue
        if block.file is not None:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), where
        for line in block.lines:
            if sidt_words(line) is not None and not has_placeholder(line):
                _run(line, where)
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").is_file():
            del sys.modules[name]


def _run(line: str, where: str) -> None:
    words = sidt_words(line)
    for beginning, options in SHORTER.items():
        if " ".join(["sidt", *words]).startswith(beginning):
            words += options.split()
    done = subprocess.run(
        [sys.executable, "-m", "sidt", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{where}: {line}\n{done.stdout}{done.stderr}"
