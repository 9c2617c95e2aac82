"""Full disks, folders that cannot be written, clocks that jump, and two commands on one run."""

import datetime
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from kills import Step, _content, _half_written, _prepared, _trials, steps
from small_runs import Child, Runs, command

from sidt.report.tables import table
from sidt.runs.alone import LOCK

_NOBODY = 65534
_DAY = 86_400


def run_adversity(runs: Runs) -> Iterator[list[dict[str, Any]]]:
    """A row for each situation: what was done, what came, and whether that is right. Gives all so far, each time."""
    rows: list[dict[str, Any]] = []
    for situation in (_two_at_once, _read_only, _full_disk, _clock):
        for row in situation(runs):
            rows.append(row)
            click.echo(row, err=True)
            yield rows


def adversity_text(rows: list[dict[str, Any]]) -> str:
    """What came of it, as a section."""
    heads = ["situation", "command", "what came", "as it should be"]
    lines = [[r["situation"], r["command"], r["came"], "yes" if r["right"] else "**no**"] for r in rows]
    return "\n".join(["## Disks, clocks and two commands at once", "", table(heads, lines, "md")])


def _row(situation: str, what: str, came: str, right: bool) -> dict[str, Any]:
    return {"situation": situation, "command": what, "came": " ".join(came.split())[:300], "right": right}


def _told(child: Child) -> str:
    """The one line of a command that was refused; the text with its traceback, if it was not so."""
    lines = [line for line in child.text().splitlines() if line.startswith("sidt: ")]
    return lines[-1] if child.code == 2 and lines and "Traceback" not in child.text() else child.text()[-300:]


def _refused(child: Child) -> bool:
    return child.code == 2 and _told(child).startswith("sidt: ")


def _broken(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if _half_written(path)]


def _same(step: Step, folder: Path, reference: Path) -> bool:
    return all(_content(folder / name) == _content(reference / name) for name in step.results)


def _full_disk(runs: Runs) -> Any:
    """Each step on a disk with no room for what it writes; with room, the same command goes on."""
    place = runs.folder / "small-disk"
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield _row("full disk", "all", "not tried: mounting a tmpfs needs rights that this user has not", True)
        return
    try:
        for step in steps(runs):
            folder = place / "run"
            arguments = _prepared(step, folder)
            filler = place / "filler"
            with filler.open("wb") as file:
                free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
                file.write(b"\0" * max(0, free - 8_192))
            child = command(*arguments, log=runs.folder / "disk.log")
            refused, said, broken = _refused(child), _told(child), _broken(folder)
            filler.unlink()
            again = command(*arguments, log=runs.folder / "disk.log")
            same = not again.code and _same(step, folder, step.source)
            came = f"{said}; whole files: {broken or 'yes'}; with room again: "
            came += "the same result" if same else f"code {again.code}, {'' if not again.code else again.text()[-150:]}"
            yield _row("full disk", step.name, came, refused and not broken and not again.code)
    finally:
        subprocess.run(["umount", str(place)], check=False)


def _read_only(runs: Runs) -> Any:
    """Each step on a run that belongs to somebody else, as a user without root's rights."""
    folder = runs.folder / "read-only"

    def become() -> None:
        os.environ["HOME"] = "/nonexistent"
        if not os.getuid():
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)

    for step in steps(runs):
        arguments = _prepared(step, folder)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = command(*arguments, log=runs.folder / "read-only.log", prepare=become)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield _row("read-only run folder", step.name, _told(child), _refused(child))


def _jumping(seconds: float, after: float) -> Callable[[], None]:
    """What puts the clock forward or back in a process, some time after it began: in Python's own clocks."""

    def prepare() -> None:
        began, real, kind = time.monotonic(), time.time, datetime.datetime

        def ahead() -> float:
            return seconds if time.monotonic() - began > after else 0.0

        class Jumping(kind):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return kind.now(tz) + datetime.timedelta(seconds=ahead())

        time.time = lambda: real() + ahead()
        time.time_ns = lambda: int(1e9 * time.time())
        for module in list(sys.modules.values()):
            if getattr(module, "datetime", None) is kind:
                module.datetime = Jumping

    return prepare


def _clock(runs: Runs) -> Any:
    """Steps while the clock is put a day forward or back: in their midst, and before the same command goes on."""
    for step in (s for s in steps(runs) if s.name in ("search", "run, all steps", "detect search")):
        for name, seconds in (("forward", _DAY), ("back", -_DAY)):
            folder = runs.folder / "clock"
            arguments = _prepared(step, folder)
            child = command(*arguments, log=runs.folder / "clock.log", prepare=_jumping(seconds, 1.0))
            same = not child.code and _same(step, folder, step.source)
            came = "the same result" if same else f"code {child.code}: {child.text()[-200:]}"
            yield _row(f"clock a day {name}, in Python's own clocks", step.name, came, same)


def _two_at_once(runs: Runs) -> Any:
    """A second command on a run while a first one works there."""
    known = {step.name: step for step in steps(runs)}
    log = runs.folder / "second.log"
    pairs = (
        ("train", "evaluate"),
        ("search", "train"),
        ("finetune", "search"),
        ("detect finetune", "detect search"),
    )
    for first, second in pairs:
        folder = runs.folder / "shared"
        arguments = _prepared(known[first], folder)
        other = [str(folder) if text == "RUN" else text for text in known[second].arguments]
        one = Child(arguments, runs.folder / "first.log")
        while not (folder / LOCK).exists() and not one.over():
            time.sleep(0.01)
        two = command(*other, log=log, prepare=_impatient)
        while not one.wait(1):
            pass
        same = not one.code and _same(known[first], folder, known[first].source)
        right = _refused(two) and str(folder) in _told(two) and same
        came = f"{_told(two)}; the first: {'the same result' if same else f'code {one.code}'}"
        yield _row(f"while `{first}` works", second, came, right)
    for name in ("search", "detect search"):
        folder = runs.folder / "shared"
        arguments = _prepared(known[name], folder)
        pair = [Child(arguments, runs.folder / f"{i}.log") for i in range(2)]
        while not all([child.wait(1) for child in pair]):
            pass
        codes, count = [child.code for child in pair], len(_trials(folder))
        said = "".join(_told(child) for child in pair if child.code)
        came = f"they work together: codes {codes}, {count} trials, whole files: {not _broken(folder)} {said}"
        yield _row(f"while `{name}` works", name, came, codes == [0, 0] and count >= 3 and not _broken(folder))
    step, folder = known["train"], runs.folder / "shared"
    arguments = _prepared(step, folder)
    one = Child(arguments, log)
    one.wait(1)
    one.kill()
    one.wait(30)
    again = command(*arguments, log=log, prepare=_impatient)
    yield _row("after `train` was killed", "train", "works" if not again.code else _told(again), not again.code)
    shutil.rmtree(folder)


def _impatient() -> None:
    """Do not wait for a command that may just be ending."""
    from sidt.runs import alone

    alone._PATIENCE = 0.1
