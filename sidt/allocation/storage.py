"""Where an Optuna study is kept, so that several threads and processes can work on it.

Optuna leaves two things to the database that SQLite does not do. It locks the row of a waiting trial to give it to one
worker: in SQLite two got the same trial, and the second failed as it told its score. So a transaction locks the whole
file from its begin. And two processes that start together both make the tables: so they open the file one by one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock
from sqlalchemy.exc import ArgumentError

_PATIENCE = 60  # seconds that one waits for another that writes


def shared(url: str | None) -> optuna.storages.RDBStorage | str | None:
    """A storage for ``optuna.create_study``, from a storage URL; ``None`` is in memory."""
    if url is None or _file_of(url) is None:
        return url
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _PATIENCE}})
    sqlalchemy.event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


@contextmanager
def one_by_one(url: str | None) -> Iterator[None]:
    """While the block runs, no other process of this kind opens the SQLite file; other storages are let through.

    Raises:
        OSError: the lock, a file beside the storage's, cannot be made.
    """
    file = _file_of(url) if url is not None else None
    if file is None or not file.parent.is_dir():  # which Optuna says
        yield
        return
    with FileLock(f"{file}.lock", timeout=_PATIENCE):
        yield


def _file_of(url: str) -> Path | None:
    """The SQLite file that a URL names."""
    try:
        parts = sqlalchemy.make_url(url)
    except ArgumentError:  # Optuna says it
        return None
    name = parts.database if parts.get_backend_name() == "sqlite" else None
    return None if not name or ":memory:" in name else Path(name)
