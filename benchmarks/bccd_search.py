"""Rows of benchmarks/bccd.py for the search itself: what trials find on the detector, as `sidt detect` does it."""

import shutil
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from bccd_tables import KINDS, SEARCHED, SHARES, measured, name_of, plain

from detection import spread
from sidt.detection.runs import pipeline
from sidt.detection.runs.folder import SEARCH, DetectionRun, input_size
from sidt.files import read_json, write_json
from sidt.report.tables import table
from sidt.runs.config import BudgetConfig

TRIALS = 20
_ROWS = [(kind, share) for kind in KINDS for share in SHARES]


def _place(folder: Path, kind: str, share: float) -> Path:
    return folder / SEARCHED / plain(name_of(SEARCHED, kind, share))


def searched(run: DetectionRun, seed: int, only: str) -> None:
    """Search, slice, fine-tune with the dense detector as teacher, test; a run folder for each budget."""
    for kind, share in _ROWS:
        name, place = name_of(SEARCHED, kind, share), _place(run.folder, kind, share)
        if only not in name or (place / "row.json").is_file():
            continue
        if not (place / "dense").exists():
            shutil.copytree(run.folder / "dense", place / "dense")
        settings = run.settings.model_copy(update={"budget": BudgetConfig(**{kind: share}), "trials": TRIALS})
        own = replace(run, folder=place, settings=settings)
        click.echo(f"seed {seed}, {name}: {pipeline.search(own, click.echo)}")
        click.echo(f"seed {seed}, {name}: {pipeline.finetune(own, teacher=True)}")
        tested = {
            step: pipeline.evaluate_detector(where, run.config, input_size(run), per_class=True, latency=False)["bbox"]
            for step, where in (("sliced", place / "sliced"), ("fine-tuned", place))
        }
        write_json(place / "row.json", {"search": read_json(place / SEARCH), "test": tested})
        aps = ", ".join(f"{step} {100 * own['AP']:.1f}" for step, own in tested.items())
        click.echo(f"seed {seed}, {name}: {aps}")


def search_table(folders: list[Path]) -> str:
    """Held-out and test AP of what was searched; empty if nothing was."""
    lines = []
    for kind, share in _ROWS:
        found, seeds = measured(folders, f"{SEARCHED}/{plain(name_of(SEARCHED, kind, share))}")
        if not found:
            continue
        own = [row["search"] for row in found]
        gains = [row["gain"]["found"] - row["gain"]["plain"] for row in own]
        errors = ", ".join(f"{100 * row['gain']['error']:.1f}" for row in own)
        lines.append(
            [
                f"{share:.0%} of the {KINDS[kind]}{seeds}",
                *(spread([row[key] for row in own]) for key in ("plain", "best")),
                f"{100 * np.mean(gains):+.1f}, errors {errors}",
                *(spread([row["test"][step]["AP"] for row in found]) for step in ("sliced", "fine-tuned")),
                *own[0]["parts"]["backbone"]["sliced"],
            ]
        )
    headers = ["budget", "held-out AP, plain", "held-out AP, found", "gain on fresh images", "test AP, sliced"]
    return table([*headers, "test AP, fine-tuned", "backbone params", "backbone MACs"], lines, "md") if lines else ""
