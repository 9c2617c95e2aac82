"""Kills at random moments of every step: what is left is whole, and the same command ends as if nothing had been."""

import json
import shutil
import sqlite3
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from safetensors.torch import load_file
from small_runs import FINETUNE, Child, Runs, command

from sidt.report.tables import table

_TIMES = ("seconds", "latency_ms")  # what no two runs have in common
_LONGEST = 300  # seconds that the same command may take afterwards


@dataclass(frozen=True)
class Step:
    """A step that is killed.

    Attributes:
        name: in words.
        source: the run folder that it is a step of.
        drops: what the step, and those after it, leave in the folder: gone before it begins.
        arguments: of the command, after the run folder's place is put in for ``RUN``.
        results: the files that are the same afterwards as in an undisturbed run.
    """

    name: str
    source: Path
    drops: tuple[str, ...]
    arguments: tuple[str, ...]
    results: tuple[str, ...]


def steps(runs: Runs) -> list[Step]:
    """The steps of both kinds of runs."""
    own, data = runs.classifier, ("--data-root", str(runs.digits))
    judged = ("evaluation.json", "answers.json", "provenance/evaluate.json")
    result = ("config.json", "plan.json", "model.safetensors")
    tuned = ("provenance/finetune.json", "finetune.json", "states/finetune-*", *result, *judged)
    found = ("study.db", "search", "sliced", "provenance/search.json", "provenance/slice.json", *tuned)
    dense = ("dense", "base", "scores.safetensors", "train.json", "states", "provenance", *found)
    detector = ("config.py", "plan.json", "model.safetensors", "provenance/finetune.json", "states/finetune-*")
    searched = ("study.db", "search", "sliced", "base", "scores.*", "data", "provenance", *detector)
    cpu = ("--device", "cpu")
    search = ("--budget.params", "0.6", "--score-images", "8", "--trials", "3", *cpu)
    return [
        Step("train", own, dense, ("train", "RUN", *cpu), ("dense/model.safetensors", "train.json")),
        Step("search", own, found, ("search", "RUN", *cpu), ("search/plan.json", "search/search.json")),
        Step("finetune", own, tuned, ("finetune", "RUN", *cpu), ("model.safetensors", "plan.json", "finetune.json")),
        Step("evaluate", own, judged, ("evaluate", "RUN", *cpu), ("evaluation.json", "answers.json")),
        Step(
            "run, all steps",
            own,
            dense,
            ("run", "RUN", *cpu),
            ("dense/model.safetensors", "search/plan.json", "model.safetensors", "evaluation.json"),
        ),
        Step(
            "detect search",
            runs.detector,
            searched,
            ("detect", "search", "RUN", *data, *search),
            ("search/plan.json", "sliced/model.safetensors", "scores.safetensors"),
        ),
        Step(
            "detect finetune",
            runs.detector,
            detector,
            ("detect", "finetune", "RUN", *data, *FINETUNE),
            ("model.safetensors", "plan.json"),
        ),
    ]


def run_kills(runs: Runs, count: int, minutes: float, seed: int) -> dict[str, Any]:
    """Kill each step in turn until there were enough kills, or the time is over.

    Each kill is of a copy of the run in which the step has not begun; the undisturbed run is done so once too, and its
    seconds are those that moments are drawn from.
    """
    random, end = np.random.default_rng(seed), time.monotonic() + 60 * minutes
    all_steps, folder = steps(runs), runs.folder / "killed"
    rows: dict[str, dict[str, Any]] = {}
    for number in range(count):
        step = all_steps[number % len(all_steps)]
        if time.monotonic() > end:
            break
        if step.name not in rows:
            reference = runs.folder / "undisturbed" / step.name.replace(" ", "-").replace(",", "")
            child = command(*_prepared(step, reference), log=runs.folder / "undisturbed.log", seconds=_LONGEST)
            if child.code:
                raise click.ClickException(f"{step.name} by itself: {child.text()[-500:]}")
            rows[step.name] = {"step": step.name, "seconds": child.seconds, "kills": 0, "same": 0, "ended": 0}
            rows[step.name] |= {"trials": 0, "other": 0, "leftovers": 0, "findings": [], "reference": str(reference)}
        row = rows[step.name]
        moment = float(random.uniform(0, row["seconds"]))
        _kill(step, row, folder, moment)
        click.echo(f"kill {number + 1}: {step.name} after {moment:.1f} s: {row['findings'][-1:]}", err=True)
    return {"asked": count, "kills": sum(row["kills"] for row in rows.values()), "steps": list(rows.values())}


def _prepared(step: Step, folder: Path) -> list[str]:
    """Copy the step's run to where it has not begun; the command."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(step.source, folder)
    for name in step.drops:
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [str(folder) if text == "RUN" else text for text in step.arguments]


def _kill(step: Step, row: dict[str, Any], folder: Path, moment: float) -> None:
    arguments, log = _prepared(step, folder), folder.with_suffix(".log")
    child = Child(arguments, log)
    if child.wait(moment):
        row["ended"] += 1  # before its moment came
        return
    child.kill()
    child.wait(30)
    row["kills"] += 1

    def finding(says: str) -> None:
        row["findings"].append(f"{step.name}, killed after {moment:.2f} s: {says}")

    for path in folder.rglob("*"):
        if says := _half_written(path):
            finding(f"{path.relative_to(folder)} is half-written: {says}")
    row["leftovers"] += sum(1 for path in folder.rglob(".*-*.*") if path.is_file())
    before = _trials(folder)
    again = command(*arguments, log=log, seconds=_LONGEST)
    if again.code:
        finding(f"the same command ended with {again.code}: {again.text()[-300:]}")
        return
    after = _trials(folder)
    row["trials"] += len(before)
    if lost := {number for number, trial in before.items() if after.get(number) != trial}:
        finding(f"the finished trials {sorted(lost)} are lost or others")
    differ = [name for name in step.results if _content(folder / name) != _content(Path(row["reference"]) / name)]
    if not differ:
        row["same"] += 1
    elif _trials(folder) != _trials(Path(row["reference"])):  # it was stopped within a trial
        row["other"] += 1
    else:
        finding(f"{', '.join(differ)} are not those of an undisturbed run")


def _half_written(path: Path) -> str:
    """What is wrong with a file, which a step may have been writing; empty if nothing is."""
    if not path.is_file() or path.name.startswith(".") or path.parent.name == "vis_data":  # MMEngine's logs
        return ""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".yaml", ".yml"):
            yaml.safe_load(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".png":
            return "" if path.read_bytes().endswith(b"IEND\xaeB`\x82") else "truncated"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


def _trials(folder: Path) -> dict[int, tuple[Any, ...]]:
    """The finished trials of a run's study: what was tried, and what it gave."""
    file = folder / "study.db"
    if not file.is_file():
        return {}
    found: dict[int, list[Any]] = defaultdict(list)
    with sqlite3.connect(file) as link:
        try:
            rows = link.execute(
                "select t.number, t.state, v.value, p.param_name, p.param_value from trials t "
                "left join trial_values v on v.trial_id = t.trial_id "
                "left join trial_params p on p.trial_id = t.trial_id "
                "where t.state in ('COMPLETE', 'PRUNED') order by t.number, p.param_name"
            ).fetchall()
        except sqlite3.OperationalError:  # killed before its tables were made
            return {}
    link.close()
    for number, *values in rows:
        found[number].append(tuple(values))
    return {number: tuple(values) for number, values in found.items()}


def _content(path: Path) -> Any:
    """What is in a file, without times, and what is measured in it."""
    if path.suffix == ".safetensors":
        return {name: (t.dtype, t.numpy().tobytes()) for name, t in load_file(path).items()} if path.is_file() else None
    return _timeless(json.loads(path.read_text())) if path.is_file() else None


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in (*_TIMES, "study")}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def kills_text(found: dict[str, Any]) -> str:
    """What kills came to, as a section."""
    heads = ["step", "s by itself", "kills", "the same result", "of other trials", "finished trials kept", "findings"]
    rows = [
        [r["step"], f"{r['seconds']:.1f}", r["kills"], r["same"], r["other"], r["trials"], len(r["findings"])]
        for r in found["steps"]
    ]
    findings = [f"- {says}" for row in found["steps"] for says in row["findings"]]
    litter = sum(row["leftovers"] for row in found["steps"])
    return "\n".join(
        [
            "## Kills",
            "",
            f"SIGKILL at {found['kills']} random moments ({found['asked']} asked for). Every file of the run was then",
            "whole, and the same command, given once more, ended. Its results were compared with those of an",
            "undisturbed run, weights bit for bit. A search that is killed within a trial then tries others, so its",
            "plan may be another; no finished trial is lost.",
            f"{litter} temporary files of what was being written were left behind.",
            "",
            table(heads, rows, "md"),
            *(["", *findings] if findings else []),
        ]
    )
