"""Reading and writing files so that nothing on disk is ever half-written."""

import errno
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sidt.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; rename it to ``path`` if the block succeeds.

    Raises:
        InputError: the folder cannot be written to, or the disk is full. ``path`` is then as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept: writers such as matplotlib choose the format by it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a writable output folder") from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the result from other users
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def saying_full(folder: Path) -> Iterator[None]:
    """While the block runs, where what others write to a folder finds no room, one line says it.

    A log that finds none is silent: Python's own would print a traceback for each of its lines.

    Raises:
        InputError: the disk is full, or cannot be written.
    """
    loud, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        reason = error.strerror
    except RuntimeError as error:  # torch's own writer
        if not any(word in str(error) for word in ("PytorchStreamWriter", "iostream")):
            raise
        reason = "a file was cut short"
    else:
        return
    finally:
        logging.raiseExceptions = loud
    raise InputError(f"cannot write {folder}: {reason}; free some space or choose another folder")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def check_file(path: Path) -> None:
    """Say now, and not after long work, that a file cannot be written.

    Raises:
        InputError: ``path`` is a folder, or lies in one that cannot be written to.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"cannot write {path}: {nearest} is not a folder that can be written to; choose another")


def dump_json(value: Any) -> str:
    """``value`` as the text of a JSON file."""
    return json.dumps(value, indent=1) + "\n"


def dump_compact(value: Any) -> str:
    """The same on one line, for long lists of numbers."""
    return json.dumps(value, separators=(",", ":")) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path`` in one step."""
    write_text(path, dump_json(value))


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which has each name once: of two, nobody knows which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have each key once, as YAML's standard wants it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice; PyYAML would take the last."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        yaml.YAMLError: it is none, it has a key twice, or is nested too deep.
    """
    try:
        return yaml.load(text, _UniqueKeys)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: ``path`` is missing, unreadable or not JSON (truncated, say).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_mapping)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deep for any file that SiDT writes; write it again") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is not valid JSON ({error}); it may be truncated: write it again") from None
