"""The cells of a benchmark, each a file that is made once: what makes them is given, and who makes which is settled."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from sidt.cost.budget import Budget
from sidt.cost.complexity import measure
from sidt.data.loading import Splits
from sidt.errors import InputError
from sidt.files import read_json, replacing, write_json
from sidt.space.space import DimensionSpace
from sidt.training.batches import make_loader

TOOLS = ("Torch-Pruning", "ModelOpt FastNAS")
RIVALS = (*TOOLS, "CORP", "VBP")
# One seed's model is every seed's. The tools' would differ, but choosing one takes them ten minutes a target.
DETERMINISTIC = ("dense", "L1", "L2", *TOOLS)
Method = tuple[nn.Module, dict[str, Any]]  # the smaller model, and what there is to say about it


class RivalError(Exception):
    """A rival does not get there; the results say so."""


@dataclass(frozen=True)
class Setting:
    """What every method is given. It changes none of it, and writes below ``scratch`` only.

    Attributes:
        dense: the model, in eval mode on the CPU.
        space: its dimensions.
        data: calibration and holdout are a method's; test is not.
        kind: what the target counts, ``params`` or ``macs``; SiDT's rows also take ``latency``.
        share: the part of it that may stay.
        seed: of calibration and held-out images, and of random scores.
        images: the number of calibration images.
        scratch: where what several targets share is kept.
    """

    dense: nn.Module
    space: DimensionSpace
    data: Splits
    kind: str
    share: float
    seed: int
    images: int
    scratch: Path

    @property
    def budget(self) -> Budget:
        return Budget(**{self.kind: self.share})

    @property
    def limit(self) -> int:
        dense = measure(self.dense, self.space.trace.input_size)
        bounds = self.budget.bounds(dense.params, dense.macs)
        return next(bound for bound in bounds if bound is not None)

    def cost(self, model: nn.Module) -> int:
        if self.kind == "params":
            return sum(p.numel() for p in model.parameters())
        return measure(model, self.space.trace.input_size).macs

    def calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from make_loader(sample(self.data.calibration, self.images, self.seed), 64)

    def holdout(self, count: int) -> Dataset[Any]:
        return sample(self.data.holdout, count, self.seed)


def sample(data: Dataset[Any], count: int, seed: int) -> Subset[Any]:
    """The same images in the same order for the same seed."""
    return Subset(data, np.random.default_rng(seed).permutation(len(data))[:count].tolist())  # type: ignore[arg-type]


@contextlib.contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Whether making ``file`` is this process's work: not if it is there, or another process is at it."""
    lock = _lock(file)
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        _say_if_stale(lock)
        yield False
        return
    try:
        os.write(handle, str(os.getpid()).encode())
        os.close(handle)
        yield not file.exists()
    finally:
        lock.unlink()


def _lock(file: Path) -> Path:
    return file.with_name(file.name + ".lock")


def _say_if_stale(lock: Path) -> None:
    try:
        os.kill(int(lock.read_text()), 0)
    except ProcessLookupError:
        click.echo(f"{lock} is of a process that is gone (on this machine): remove it, and that work is done again")
    except (OSError, ValueError):
        return  # just being written or removed, or another user's process


def cached(folder: Path, name: str, compute: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """Tensors that several cells share, and the seconds that an earlier cell has spent on them."""
    file, spent = folder / f"{name}.safetensors", folder / f"{name}.json"
    while not spent.exists():
        with claim(spent) as mine:
            if mine:
                begin, tensors = time.perf_counter(), compute()
                with replacing(file) as temporary:
                    temporary.write_bytes(dump_tensors({k: v.contiguous() for k, v in tensors.items()}))
                write_json(spent, {"seconds": time.perf_counter() - begin})
                return tensors, 0.0
        time.sleep(2)  # another process is at it
    return load_file(file), read_json(spent)["seconds"]


@dataclass(frozen=True)
class Cell:
    """A row at a target with a seed, and how it is trained: not, on some images once, or for some epochs."""

    row: str
    kind: str
    share: float
    seed: int
    images: int = 0
    epochs: int = 0
    lr: float = 0.0
    teacher: bool = False

    @property
    def step(self) -> str:
        """The training but for its learning rate."""
        if not self.images and not self.epochs:
            return "no training"
        length = f"{self.images:,} images" if self.images else f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        return length + (", teacher" if self.teacher else "")

    @property
    def untrained(self) -> "Cell":
        return replace(self, images=0, epochs=0, lr=0.0, teacher=False)

    def folder(self, runs: Path) -> Path:
        """Of the model before training, which the trainings of all seeds share where the row is deterministic."""
        seed = 0 if self.row in DETERMINISTIC else self.seed
        row = "".join(c if c.isalnum() else "-" for c in self.row.lower()).strip("-")
        return runs / row / f"{self.kind}-{self.share:g}" / f"seed-{seed}"

    def file(self, runs: Path) -> Path:
        if self == self.untrained:
            return self.folder(runs) / "sliced.json"
        name = f"{self.step} lr {self.lr:g} seed {self.seed}".replace(",", "").replace(" ", "-")
        return self.folder(runs) / f"{name}.json"


def rated(cell: Cell, rates: Sequence[float], runs: Path, first: int) -> list[Cell]:
    """A training at each rate with the first seed; with another seed, at the one that was best with the first."""
    if cell.seed == first:
        return [replace(cell, lr=rate) for rate in rates]
    tried = {rate: replace(cell, lr=rate, seed=first).file(runs) for rate in rates}
    if any(_lock(file).exists() for file in tried.values()):
        return []  # another process is at it
    results = {rate: read_json(file) for rate, file in tried.items() if file.exists()}
    good = {rate: result["top1"] for rate, result in results.items() if "failed" not in result}
    return [replace(cell, lr=max(good, key=lambda rate: good[rate]))] if good else []


def work(cells: Sequence[Cell], runs: Path, make: Callable[[Cell], dict[str, Any]]) -> None:
    """Make the cells that are not there and that no other process is at."""
    again = True
    while again:  # what another process has finished meanwhile may be what a training waited for
        again = False
        for cell in cells:
            file = cell.file(runs)
            if file.exists() or (cell != cell.untrained and not cell.untrained.file(runs).exists()):
                continue
            with claim(file) as mine:
                if not mine:
                    continue
                try:
                    result = make(cell)
                except (RivalError, InputError) as error:
                    result = {"failed": str(error)}
                write_json(file, result)
                said = result.get("failed") or f"{result['top1']:.2%} in {result['seconds']:.0f} s"
                rate = f", lr {cell.lr:g}" if cell.lr else ""
                click.echo(f"{cell.row}, {cell.kind} {cell.share:g}, seed {cell.seed}, {cell.step}{rate}: {said}")
                again = True
