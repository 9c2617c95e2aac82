"""One command at a time in a run folder."""

import subprocess
import sys

import pytest

from sidt.runs import alone
from sidt.runs.alone import working_in

HOLD = """
import sys
from pathlib import Path
from sidt.runs.alone import working_in
with working_in(Path(sys.argv[1]), together=sys.argv[2] == "together"):
    print("works", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(alone, "_PATIENCE", 0.2)


@pytest.fixture
def hold(tmp_path):
    """Starts a process that works in a folder until it is killed or its input ends."""
    started = []

    def start(how):
        arguments = [sys.executable, "-c", HOLD, str(tmp_path / "run"), how]
        started.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "works\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("first", "second"), [("alone", False), ("alone", True), ("together", False)])
def test_a_second_command_is_told_and_works_once_the_first_was_killed(first, second, hold, tmp_path, refused):
    process, folder = hold(first), tmp_path / "run"
    with refused("another sidt command", folder), working_in(folder, together=second):
        pass
    process.kill()
    process.wait()
    with working_in(folder, together=second):
        (folder / "config.yaml").touch()


def test_searches_work_together(hold, tmp_path):
    hold("together")
    with working_in(tmp_path / "run", together=True):
        pass


def test_processes_of_one_launcher_are_one_command(hold, tmp_path, monkeypatch):
    hold("alone")
    monkeypatch.setenv("RANK", "1")
    with working_in(tmp_path / "run"):
        pass


def test_a_folder_in_which_nothing_was_made_does_not_stay(tmp_path):
    for together in (False, True):
        with pytest.raises(ZeroDivisionError), working_in(tmp_path / "run", together=together):
            raise ZeroDivisionError
        assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path, refused):
    (tmp_path / "file").touch()
    with refused("cannot write", tmp_path / "file"), working_in(tmp_path / "file" / "run"):
        pass


def test_every_command_says_it(tmp_path, monkeypatch, refused):
    """The lock is held where a command opens its run."""
    from click.testing import CliRunner

    from sidt.cli.commands import cli

    (tmp_path / "config.yaml").write_text("model: {name: vit_tiny_patch16_224}\nbudget: {params: 0.5}\n")
    monkeypatch.setenv("RANK", "0")
    with working_in(tmp_path):
        for name in ("train", "score", "search", "slice", "finetune", "evaluate", "report", "run"):
            done = CliRunner().invoke(cli, [name, str(tmp_path)], standalone_mode=False)
            assert "another sidt command works in" in str(done.exception), name
