"""How much sooner a search is done with two workers than with one, on one machine.

    python benchmarks/workers.py --data DIR --weights FILE
    python benchmarks/workers.py --data DIR --detector RUN --out benchmarks/results/workers_detector

DIR and FILE are those of classification.py; RUN is a run folder of `sidt detect` with a dense detector, of whose
backbone a tenth of the multiply-adds is searched, and DIR its images. One run is scored; the same number of trials is
then searched in copies of it, in turn: by one worker with one thread, by one with all cores, and by two that share
them. Each is a command as it is typed, timed from its start to its end, which holds the loading of the model and the
check of the best trials on fresh images; of the study's own times, from the start of its first trial to the end of its
last one. What is tried differs, and how much of it is stopped early, so that the parts of the held-out images that were
judged are counted.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
from results import environment, write_results

from sidt.report.tables import table
from sidt.runs.quality import PARTS

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "classification" / "cifar100_vit.yaml"
WAYS: dict[str, tuple[int, Mapping[str, str]]] = {
    "one worker, one thread": (1, {"OMP_NUM_THREADS": "1"}),
    "one worker, all cores": (1, {}),
    "two workers": (2, {}),
}


def sidt(*args: object, **own: str) -> float:
    """Seconds of a command."""
    begin = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", "sidt", *map(str, args)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | own)
    return time.perf_counter() - begin


def searched(
    step: tuple[object, ...], scored: Path, folder: Path, trials: int, workers: int, own: Mapping[str, str]
) -> tuple[float, float, int]:
    """Seconds of a search of so many trials in a copy of a scored run: of the command, of the trials; parts judged."""
    shutil.copytree(scored, folder)
    seconds = sidt(*step, folder, "--trials", trials, "--workers", workers, **own)
    storage = f"sqlite:///{folder / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    done = [t for t in optuna.load_study(study_name=name, storage=storage).trials if t.state.is_finished()]
    if len(done) < trials:
        raise click.ClickException(f"{folder} has {len(done)} finished trials of {trials}")
    ends = [t.datetime_complete for t in done if t.datetime_complete]
    starts = [t.datetime_start for t in done if t.datetime_start]
    return seconds, (max(ends) - min(starts)).total_seconds(), sum(len(t.intermediate_values) for t in done)


@click.command()
@click.option("--data", "root", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--weights", type=click.Path(exists=True, path_type=Path))
@click.option("--detector", type=click.Path(exists=True, path_type=Path))
@click.option("--trials", default=32, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "workers", show_default=True)
def main(root: Path, weights: Path | None, detector: Path | None, trials: int, rounds: int, out: Path) -> None:
    """Measure each way in turn, several times; the medians are the results."""
    where = environment()
    found: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        scored, first = Path(name) / "scored", Path(name) / "first"
        if detector is not None:
            scored.mkdir()
            shutil.copytree(detector / "dense", scored / "dense")
            step: tuple[object, ...] = ("detect", "search", "--data-root", root.resolve(), "--budget.macs", 0.1)
        elif weights is not None:
            values = [f"data.root={root.resolve()}", f"model.checkpoint={weights.resolve()}"]
            sidt("train", CONFIG, "--out", scored, *(part for value in values for part in ("--set", value)))
            sidt("score", scored)
            step = ("search",)
        else:
            raise click.UsageError("give --weights or --detector")
        searched(step, scored, first, 1, 1, {})  # measures what all of them read
        for study in first.glob("study.db*"):
            study.unlink()
        for round_ in range(rounds):
            for way, (workers, own) in WAYS.items():
                folder = Path(name) / f"{workers}-{len(own)}-{round_}"
                found[way].append(searched(step, first, folder, trials, workers, own))
                click.echo(f"{way}: {found[way][-1][0]:.1f} s, of which trials {found[way][-1][1]:.1f} s", err=True)
    medians = {way: [float(np.median(each)) for each in zip(*rows, strict=True)] for way, rows in found.items()}
    rates = {way: parts / of_trials for way, (_, of_trials, parts) in medians.items()}
    slowest, rate = medians["one worker, one thread"], rates["one worker, one thread"]
    rows: list[list[Any]] = [
        [way, f"{command:.1f}", f"{of_trials:.1f}", f"{slowest[1] / of_trials:.2f}", parts, f"{rates[way] / rate:.2f}"]
        for way, (command, of_trials, parts) in medians.items()
    ]
    headers = ["", "command, s", "trials, s", "times as fast", "parts judged", "parts a second, times as many"]
    what = f"{CONFIG.name} with repair, on its held-out images"
    judges = f"{PARTS} parts of the images, or fewer where it is stopped early"
    if detector is not None:
        what, judges = "a detector with repair, by its AP on the held-out images", "all of them at once"
    text = f"{trials} trials of {what}; medians of {rounds} rounds in turn. A trial judges {judges}.\n\n"
    text += table(headers, rows, "md")
    click.echo(text)
    write_results(out, "A search by several workers", where, text, {way: times for way, times in found.items()})


if __name__ == "__main__":
    main()
