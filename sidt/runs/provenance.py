"""What every output of a run was made of, so that no step takes the old of one for the new of another.

A step first checks all that it stands on, and takes the digests of its inputs; when its outputs are on disk, it writes
both digests to ``provenance/STEP.json``. A record is believed only of the very outputs that it names: where they are
others (put there by hand, by an earlier version, or by a step that was stopped before its record), nothing is known of
them, and nothing is said. Where some are and some are not, the step was stopped between them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sidt.errors import InputError
from sidt.files import read_json, write_json

Digests = dict[str, str]  # by file, relative to the run folder


@dataclass(frozen=True)
class Step:
    """A step of a run.

    Attributes:
        makes: what it makes, in words.
        place: where that is, relative to the run folder.
        files: what tells one output from another: safetensors and JSON.
        of: the steps whose outputs it reads.
    """

    makes: str
    place: str
    files: tuple[str, ...]
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """The steps of a kind of run, each after those it reads from, and the command that they are steps of."""

    command: str
    steps: Mapping[str, Step]

    def before(self, name: str) -> list[str]:
        """All that a step stands on, in order."""
        found = set(self.steps[name].of)
        for earlier in reversed(list(self.steps)):
            if earlier in found:
                found |= set(self.steps[earlier].of)
        return [step for step in self.steps if step in found]


def inputs(folder: Path, chain: Chain, name: str) -> Digests:
    """Check all that a step stands on, as far as it is there; the digests of what it reads.

    Raises:
        InputError: something was made of another input than there is now; the message names the first, and the step
            that makes it again.
    """
    for earlier in chain.before(name):
        _check(folder, chain, earlier)
    return _inputs(folder, chain, name)


def record(folder: Path, chain: Chain, name: str, made_of: Digests) -> None:
    """Note what the outputs of a step, which are on disk, were made of: what :func:`inputs` gave when it began."""
    write_json(_note(folder, name), {"outputs": _digests(folder, chain.steps[name]), "inputs": made_of})


def _check(folder: Path, chain: Chain, name: str) -> None:
    step, again = chain.steps[name], f"run `{chain.command} {name} {folder}` again"
    noted = _noted(_note(folder, name))
    if noted is None:
        return
    outputs, made_of = noted
    here = _digests(folder, step)
    same = [file for file in here if here[file] == outputs.get(file)]
    other = [file for file in here if file not in same]
    if not same:
        return
    if other:
        raise InputError(f"{folder / other[0]} and {folder / same[0]} are not of one `{chain.command} {name}`; {again}")
    for source in (chain.steps[earlier] for earlier in step.of):
        there = _digests(folder, source)
        if any(made_of.get(file) != digest for file, digest in there.items()):
            makes = source.makes
            which = f"of another {makes} than" if set(there) & set(made_of) else f"without the {makes} that"
            raise InputError(f"{folder / step.place} was made {which} is now in {folder / source.place}; {again}")


def _inputs(folder: Path, chain: Chain, name: str) -> Digests:
    sources = (chain.steps[earlier] for earlier in chain.steps[name].of)
    return {file: digest for source in sources for file, digest in _digests(folder, source).items()}


def _note(folder: Path, name: str) -> Path:
    return folder / "provenance" / f"{name}.json"


def _noted(path: Path) -> tuple[Digests, Digests] | None:
    """The outputs and inputs of a record, ``None`` if there is none."""
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        return dict(found["outputs"]), dict(found["inputs"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged; remove it, and what it is of is taken as it is") from None


def _digests(folder: Path, step: Step) -> Digests:
    """Of the files of a step that are there."""
    there = {name: folder / name for name in step.files if (folder / name).is_file()}
    return {name: digest_of(path) for name, path in there.items()}


def digest_of(path: Path) -> str:
    """Tells contents apart: of safetensors the tensors (their metadata are written in any order), of JSON the values.

    Raises:
        InputError: the file cannot be read or is damaged.
    """
    seen = path.stat()
    return _digest(path, seen.st_ino, seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=64)  # a run of all steps reads each file once
def _digest(path: Path, *version: int) -> str:
    digest = hashlib.sha256()
    for part in _contents(path):
        digest.update(part)
    return digest.hexdigest()


def _contents(path: Path) -> Iterator[bytes]:
    if path.suffix == ".json":
        yield _dumped(read_json(path))
        return
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            yield _dumped({name: value for name, value in header.items() if name != "__metadata__"})
            while part := file.read(1 << 20):
                yield part
    except (OSError, ValueError, AttributeError, MemoryError, OverflowError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())[:200]}; it may be truncated") from None


def _dumped(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
