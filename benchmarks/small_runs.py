"""Runs on digits that take seconds, of a classifier and of a detector, and commands in processes of their own."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click
import torch

from sidt.cli.commands import main

CONFIGS = Path(__file__).parents[1] / "configs"
# The three trials are those that are asked for before any is drawn; what is drawn depends on when a search was stopped.
_SETS = (
    "model.args={img_size: 16, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, num_classes: 10}",
    *("data.image_size=16", "train.epochs=4", "finetune.epochs=4", "budget.params=0.5", "score.images=64"),
    *("search.pareto=false", "search.trials=3", "search.images=64"),
)
_OPTIONS = (
    "model.backbone.args={img_size: 64, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    *("model.neck.in_channels=32", "train_cfg.max_epochs=1"),
)
FINETUNE = ("--cfg-options", "train_cfg.max_epochs=2", "--cfg-options", "train_cfg.val_interval=2")


@dataclass(frozen=True)
class Runs:
    """Run folders all of whose steps are done.

    Attributes:
        classifier: of ``sidt run``.
        detector: of ``sidt detect``.
        digits: the images of the detector.
        folder: for more of them.
    """

    classifier: Path
    detector: Path
    digits: Path
    folder: Path


class Child:
    """A command of ``sidt`` in a process of its own, which has the imports of this one: it starts at once.

    Args:
        arguments: after ``sidt``.
        log: what it prints.
        prepare: called in the process, before the command.
    """

    def __init__(self, arguments: Sequence[str], log: Path, prepare: Callable[[], object] | None = None) -> None:
        self.began = time.perf_counter()
        self.log = log
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(arguments, log, prepare)

    def kill(self) -> None:
        """End it as a machine does that is out of memory."""
        os.kill(self.pid, signal.SIGKILL)

    def over(self) -> bool:
        """Whether it has ended; its code is then kept."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float) -> bool:
        """Whether it ended within some seconds."""
        end = time.perf_counter() + seconds
        while not (ended := self.over()) and time.perf_counter() < end:
            time.sleep(0.005)
        self.seconds = time.perf_counter() - self.began
        return ended

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


def _become(arguments: Sequence[str], log: Path, prepare: Callable[[], object] | None) -> None:
    """Be the command, and end."""
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        sys.argv = ["sidt", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(*arguments: str, log: Path, prepare: Callable[[], object] | None = None, seconds: float = 180) -> Child:
    """A command that has ended, or was killed since it did not in some seconds (its code is then -9)."""
    child = Child(arguments, log, prepare)
    if not child.wait(seconds):
        child.kill()
        child.wait(10)
    return child


def made(folder: Path) -> Runs:
    """Make the runs, or take those that are there."""
    for name in ("pipeline", "outcome"):
        import_module(f"sidt.runs.{name}")  # once here, and not in each process
    import_module("sidt.detection.runs.pipeline")
    runs = Runs(folder / "classifier", folder / "detector", folder / "digits", folder)
    folder.mkdir(parents=True, exist_ok=True)
    sets = [part for text in _SETS for part in ("--set", text)]
    options = [part for text in _OPTIONS for part in ("--cfg-options", text)]
    config, other = CONFIGS / "classification" / "digits_vit.yaml", CONFIGS / "detection" / "digits_vit.py"
    data, run = ["--data-root", str(runs.digits)], str(runs.detector)
    search = ["--budget.params", "0.6", "--score-images", "8", "--trials", "3", "--device", "cpu"]
    steps = {
        runs.classifier / "report.html": ["run", str(config), "--out", str(runs.classifier), "--device", "cpu", *sets],
        runs.digits / "digits.json": [
            "detect",
            "digits",
            str(runs.digits),
            "--train",
            "24",
            "--val",
            "6",
            "--size",
            "64",
        ],
        runs.detector / "dense": ["detect", "train", str(other), "--out", run, *data, *options],
        runs.detector / "sliced": ["detect", "search", run, *data, *search],
        runs.detector / "model.safetensors": ["detect", "finetune", run, *data, *FINETUNE],
    }
    for result, arguments in steps.items():
        if not result.exists():
            child = command(*arguments, log=folder / "made.log", seconds=600)
            if child.code:
                raise click.ClickException(f"sidt {' '.join(arguments[:2])}: {child.text()[-500:]}")
    return runs
