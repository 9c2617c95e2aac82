"""Changed files, each given to what reads such a file: it works and is right, or one line says what is wrong."""

import json
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import click
import numpy as np
import yaml
from damage import DOUBLED, changed_bytes, changed_tensors, changed_tree, doubled_key, written
from readers import Reader, readers
from small_runs import Runs

from sidt.errors import InputError
from sidt.report.tables import table

_LONGEST = 60  # seconds, after which it hangs
_MEMORY = 6 * 2**30  # bytes more than there were


class _HangError(BaseException):
    """Past the longest time; no handler of an ``Exception`` takes it."""


def mutated(reader: Reader, seed: int, number: int, kind: int) -> str:
    """Write a changed file where the reader's is; what was done, in words."""
    random = np.random.default_rng([seed, kind, number])
    good = reader.good.read_bytes()
    if reader.good.suffix == ".safetensors":
        data, says = changed_tensors(good, random)
    elif random.random() < 0.3:
        data, says = changed_bytes(good, random)
    else:
        style = reader.good.suffix.removeprefix(".")
        text = json.dumps(json.loads(good), indent=1) if style == "json" else good.decode()
        doubled = doubled_key(text, random, style) if random.random() < 0.1 else None
        if doubled is not None:
            data, says = doubled[0].encode(), doubled[1]
        else:
            tree, says = changed_tree(yaml.safe_load(text) if style == "yaml" else json.loads(text), random)
            data = written(tree, style)
    reader.place.write_bytes(data)
    return says


def outcome(reader: Reader) -> tuple[str, str]:
    """What came of reading a file: ``taken``, ``refused``, or what should not be; and the words that it came with."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(_LONGEST)
    try:
        with redirect_stderr(StringIO()):
            read = reader.read(reader.place)
    except (InputError, click.ClickException) as error:
        return "refused", " ".join(str(error).split())
    except _HangError:
        return "hang", traceback.format_exc(limit=-3)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        own = [f for f in where if "/sidt/" in f.filename or "/detection/" in f.filename]
        last = (own or where)[-1]
        return "traceback", f"{type(error).__name__}: {str(error)[:150]} ({Path(last.filename).name}:{last.lineno})"
    finally:
        signal.alarm(0)
    try:
        reader.check(reader.place, read)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {str(error)[:200]}"
    return "taken", ""


def _hangs(number: int, frame: FrameType | None) -> None:
    raise _HangError


def run_mutations(runs: Runs, count: int, seed: int, only: str | None = None) -> list[dict[str, Any]]:
    """Read changed files of all kinds; a row for each kind.

    Args:
        runs: whose files are changed.
        count: changed files in all.
        seed: of the changes.
        only: a kind, or ``kind/number``, to see one again.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.RLIM_INFINITY))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        kinds = readers(runs.classifier, runs.detector, runs.digits, Path(name) / "files")
        for kind, reader in enumerate(kinds):
            wanted, _, number = (only or reader.name).partition("/")
            if wanted != reader.name:
                continue
            share = [count // len(kinds) + (kind < count % len(kinds)), kind]
            rows.append(_of_kind(reader, seed, kind, [int(number)] if number else range(share[0])))
            reader.place.write_bytes(reader.good.read_bytes())
    return rows


def _of_kind(reader: Reader, seed: int, kind: int, numbers: Any) -> dict[str, Any]:
    begin, outcomes, findings, longest = time.perf_counter(), Counter[str](), [], 0
    reader.place.write_bytes(reader.good.read_bytes())
    if (found := outcome(reader))[0] != "taken":
        raise click.ClickException(f"the good {reader.name} is not taken: {found}")
    for number in numbers:
        says = mutated(reader, seed, number, kind)
        ended, words = outcome(reader)
        if ended == "taken" and says.endswith(DOUBLED) and not reader.last_counts:
            ended, words = "wrong", "nobody knows which of two is meant"
        outcomes[ended] += 1
        longest = max(longest, len(words) if ended == "refused" else 0)
        if ended not in ("taken", "refused"):
            findings.append({"file": f"{reader.name}/{number}", "change": says, "ended": ended, "words": words})
            click.echo(f"{reader.name}/{number} ({says}): {ended}: {words}", err=True)
    seconds = time.perf_counter() - begin
    click.echo(f"{reader.name}: {dict(outcomes)} in {seconds:.0f} s", err=True)
    return {
        "kind": reader.name,
        "by": reader.by,
        "right": reader.right,
        "files": sum(outcomes.values()),
        "taken": outcomes["taken"],
        "refused": outcomes["refused"],
        "longest": longest,
        "findings": findings,
        "seconds": seconds,
    }


def mutations_text(rows: list[dict[str, Any]]) -> str:
    """What changed files came to, as a section."""
    lines = [[r["kind"], r["files"], r["refused"], r["taken"], len(r["findings"]), r["by"], r["right"]] for r in rows]
    heads = ["file", "changed", "refused", "taken, and right", "findings", "read by", "what was taken is right if"]
    found = [f for row in rows for f in row["findings"]]
    total = f"{sum(r['files'] for r in rows):,} files, each changed in one place: another type, a key gone, renamed or"
    return "\n".join(
        [
            "## Changed files",
            "",
            f"{total} twice, null, NaN, infinite,",
            "negative, huge, off by one, of another length, nested up to 20,000 deep, truncated, random bytes, another",
            "encoding. Refused is one line that names the file or the key (InputError, exit code 2). A finding is any",
            f"other exception, more than {_LONGEST} s, or a file that was taken for what it is not.",
            "",
            table(heads, lines, "md"),
            *(["", *(f"- {f['file']}: {f['change']}: {f['ended']}: {f['words']}" for f in found)] if found else []),
        ]
    )
