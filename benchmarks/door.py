"""What a user waits for before a command says something, beside what no command on a model can do without.

    python benchmarks/door.py --earlier COMMIT

Every command is a process of its own, all in turn, so that what else the machine does falls on all of them. The time
of the processor is the process's own; the wall's has the machine's other work in it. ``--earlier`` times the commands
of another commit too, in a worktree beside this one, with the same packages.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import yaml
from results import environment, write_results

from sidt.report.tables import table

HERE = Path(__file__).parent
ROOT = HERE.parent
LEAST = "import torch, timm"
COMMANDS = (
    "--help",
    "spaces",
    "spaces deit_small_patch16_224",
    "complexity deit_small_patch16_224",
    "complexity RUN",
    "search RUN",
)
# The folders of a commit as they are installed: detection/ and the other two stand inside sidt.
PARTS = ("detection", "search_spaces", "configs")
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
TINY = {
    "model": {"name": "deit_tiny_patch16_224", "args": SMALL},
    "data": {"name": "digits", "image_size": 16},
    "train": {"epochs": 1},
    "score": {"images": 64},
    "budget": {"params": 0.6},
    "search": {"trials": 3, "images": 64},
}


def first_line(program: Sequence[str], path: Path) -> tuple[float, float, float]:
    """Seconds until a Python in a folder says its first line, and the processor's in all: wall, user, system.

    Raises:
        RuntimeError: it failed.
    """
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=path,  # where python -m looks first
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        wall = time.perf_counter() - begin
        process.stdout.read()
        error = process.stderr.read().decode()
    if process.returncode:
        raise RuntimeError(f"{program} ended with {process.returncode}: {error}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime


def installed(commit: str, folder: Path) -> Path:
    """A folder in which ``import sidt`` imports a commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    for part in PARTS:
        (folder / part).rename(folder / "sidt" / part)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder / "sidt")], check=True)
    first_line(["-c", f"import sidt.runs; assert sidt.runs.__file__.startswith({str(folder)!r})"], folder)
    return folder


def finished_run(path: Path, folder: Path) -> Path:
    """A run whose search has ended."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for step in ("train", "score", "search"):
        source = [folder / "tiny.yaml", "--out", folder / "run"] if step == "train" else [folder / "run"]
        first_line(["-m", "sidt", step, *map(str, source)], path)
    return folder / "run"


def rows_of(seen: Mapping[str, Sequence[tuple[float, float, float]]]) -> list[list[str]]:
    """For each command the medians, and how its processor time stands to that of the least, round by round."""
    rows = []
    for name, times in seen.items():
        wall, user = (statistics.median(t[i] for t in times) for i in (0, 1))
        ratios = [own[1] / least[1] for own, least in zip(times, seen[LEAST], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([f"`{name}`", f"{wall:.2f}", f"{user:.2f}", spread])
    return rows


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--earlier", help="A commit whose commands are timed too.")
@click.option("--out", default=str(HERE / "results" / "door"), type=click.Path(path_type=Path))
def main(rounds: int, earlier: str | None, out: Path) -> None:
    """Time all commands in turn, then write the results."""
    where, texts, data = environment(), [], {}
    with ExitStack() as stack:
        versions = {
            name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in ("HEAD", earlier) if name
        }
        programs: dict[tuple[str, str], tuple[list[str], Path]] = {}
        for version, folder in versions.items():
            path = installed(version, folder)
            run = str(finished_run(path, Path(stack.enter_context(tempfile.TemporaryDirectory()))))
            for command in COMMANDS:
                words = [run if word == "RUN" else word for word in command.split()]
                programs[version, f"sidt {command}"] = (["-m", "sidt", *words], path)
        seen: dict[tuple[str, str], list[tuple[float, float, float]]] = {key: [] for key in programs}
        least = []
        first_line(["-c", LEAST], ROOT)  # from here on the files are in memory
        for _ in range(rounds):
            least.append(first_line(["-c", LEAST], ROOT))
            for key, (program, path) in programs.items():
                seen[key].append(first_line(program, path))
    headers = ["command", "wall, s, to the first line", "user, s, in all", f"user / that of `{LEAST}`"]
    for version in versions:
        times = {LEAST: least} | {name: own for (v, name), own in seen.items() if v == version}
        title = "This commit" if version == "HEAD" else f"Before, {version}"
        texts.append(f"{title}:\n\n{table(headers, rows_of(times), 'md')}")
        data[version] = times
    text = (
        f"Medians of {rounds} rounds, all in turn, each a process; the ratio has its least and its most. "
        f"RUN has ended its search of {TINY['search']['trials']} trials.\n\n" + "\n\n".join(texts)
    )
    write_results(out, "The front door", where, text, data)
    click.echo(text)


if __name__ == "__main__":
    main()
