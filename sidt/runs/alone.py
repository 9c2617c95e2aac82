"""One command at a time works in a run folder; searches work there together.

The system lets go of a lock as its process ends, however it ends, so none is ever left behind.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sidt.errors import InputError

LOCK, _SEARCHES = "run.lock", "searches.lock"
_PATIENCE = 6  # seconds; processes that read images may outlive by five the command that they read for
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # of the processes that a launcher starts for one command


@contextmanager
def working_in(folder: Path | None, *, together: bool = False) -> Iterator[None]:
    """While the block runs, no other command works in a run folder.

    Args:
        folder: the run folder, which is made; None: there is none, and nothing to guard.
        together: others that say the same may work there at once: the searches of one study.

    Raises:
        InputError: another command works there, or the folder cannot be written.
    """
    if folder is None or next((os.environ[key] for key in _RANKS if key in os.environ), "0") != "0":
        yield
        return
    new = not folder.exists()
    try:
        with ExitStack() as held:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _guard(folder, held, together)
            except NotImplementedError:  # a file system without locks
                pass
            except Timeout:
                raise InputError(
                    f"another sidt command works in {folder}; wait until it ends, or stop it, or use another folder"
                ) from None
            except OSError as error:
                raise InputError(
                    f"cannot write {folder}: {error.strerror or error}; choose a writable run folder"
                ) from None
            yield
    finally:
        if new and folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK, _SEARCHES}:
            shutil.rmtree(folder, ignore_errors=True)  # nothing came of it


def _guard(folder: Path, held: ExitStack, together: bool) -> None:
    """Hold the folder's lock, or, of a search, one of its own, which is made while nobody holds the folder's."""
    whole, searches = FileLock(folder / LOCK), folder / _SEARCHES
    if together:
        with whole.acquire(timeout=_PATIENCE):
            searches.mkdir(exist_ok=True)
            held.enter_context(FileLock(searches / f"{uuid.uuid4().hex}.lock").acquire(timeout=0))
        return
    held.enter_context(whole.acquire(timeout=_PATIENCE))
    for file in searches.glob("*.lock"):
        with FileLock(file).acquire(timeout=_PATIENCE):
            file.unlink(missing_ok=True)
