"""Where an Optuna study is kept, so that several threads, processes and machines can work on it.

A URL of SQLAlchemy names an SQLite file or a database server, ``journal:///PATH`` Optuna's journal file, for disks that
machines share. In databases a trial gives signs of life while it runs: one whose worker was killed is failed after a
while, and tried again. A journal has none: there it stays as running, and counts for nothing.

Optuna leaves two things to the database that SQLite does not do. It locks the row of a waiting trial to give it to one
worker: in SQLite two got the same trial, and the second failed as it told its score. So a transaction locks the whole
file from its begin. And where two processes that start together both make the tables, one of them fails, in a server
too: so they open a storage one by one.
"""

import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import fail_stale_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy.exc import ArgumentError

from sidt.errors import InputError

_PATIENCE = 60  # seconds that one waits for another that writes, or for a server that went away
_PAUSE = 2  # seconds before a server is asked again
_BEAT = 15  # seconds between a trial's signs of life
_GRACE = 60  # seconds without one after which its worker counts as gone
_RETRIES = 3  # a trial that ended so many workers is not tried again
_JOURNAL = "journal:///"
_EXTRAS = {"postgresql": "postgres", "mysql": "mysql"}
# What makes a connection wait until it is the only one that opens; its end lets the next one go on.
_ALONE = {
    "postgresql": (f"SET lock_timeout = '{_PATIENCE}s'", "SELECT pg_advisory_lock(hashtext('sidt'))"),
    "mysql": (f"SELECT GET_LOCK('sidt', {_PATIENCE})",),
}


def shared(url: str) -> optuna.storages.BaseStorage:
    """A storage for ``optuna.create_study``, from its URL.

    Raises:
        InputError: the URL's driver is not installed.
    """
    if url.startswith(_JOURNAL):
        return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix(_JOURNAL)))
    options: dict[str, Any] = {"pool_pre_ping": True}  # a connection that a server's restart has cut is made again
    if _file_of(url) is not None:
        options = {"connect_args": {"timeout": _PATIENCE}}
    with warnings.catch_warnings(), _driver_of(url):
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            url,
            engine_kwargs=options,
            heartbeat_interval=_BEAT,
            grace_period=_GRACE,
            heartbeat_stale_trial_callback=_tried_again(),
        )
    if _file_of(url) is not None:
        sqlalchemy.event.listen(storage.engine, "begin", lambda link: link.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


@contextmanager
def _driver_of(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        extra = _EXTRAS.get(sqlalchemy.make_url(url).get_backend_name())
        advice = f"pip install 'sidt[{extra}]'" if extra else "install it"
        raise InputError(f"the storage {shown(url)} needs a driver that is not installed; {advice}") from None


def fail_gone(study: optuna.Study, kept: optuna.storages.BaseStorage) -> None:
    """Fail the trials whose worker is gone, and put them up to be tried again.

    Optuna knows those whose signs of life have ceased. A worker that was killed, or whose server went away, between the
    start of its trial and the first sign has left none.
    """
    if not isinstance(kept, optuna.storages.RDBStorage):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fail_stale_trials(study)
        again = _tried_again()
    with kept.engine.connect() as link:
        alive = set(link.scalars(sqlalchemy.text("SELECT trial_id FROM trial_heartbeats")))
    late = datetime.now() - timedelta(seconds=_GRACE)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if trial._trial_id not in alive and trial.datetime_start is not None and trial.datetime_start < late:
            again(study, study.tell(trial.number, state=TrialState.FAIL))


def _tried_again() -> optuna.storages.RetryHeartbeatStaleTrialCallback:
    return optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES)


def gives_signs(url: str | None) -> bool:
    """Whether trials that are kept there show that their worker lives."""
    return url is not None and not url.startswith(_JOURNAL)


def shown(url: str) -> str:
    """A storage's URL without its password, for messages."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def insist(work: Callable[[], None], url: str | None) -> None:
    """Do some work on a study; where a database server goes away meanwhile, go on once it is back.

    The trials that it was at when the server went give no signs of life, so others try them again.

    Raises:
        InputError: the storage cannot be written, or its server stays away.
    """
    last = time.monotonic()
    while True:
        begin = time.monotonic()
        try:
            return work()
        except Exception as error:
            cause = _of_storage(error)
            if cause is None:
                raise
            if time.monotonic() - begin > _PATIENCE:  # it had come back
                last = time.monotonic()
            if url is None or _file_of(url) is not None or time.monotonic() - last > _PATIENCE:
                reason = " ".join(str(cause.__cause__ or cause).split())[:200]
                asked = "is the disk full?" if url and _file_of(url) is not None else "does its server run?"
                where = shown(url or "memory")
                raise InputError(f"cannot write the study to {where}: {reason}; {asked}") from None
            time.sleep(_PAUSE)


def _of_storage(error: BaseException | None) -> StorageInternalError | None:
    """The error of the storage from which another came: Optuna's own loop fails over it in ways of its own."""
    while error is not None and not isinstance(error, StorageInternalError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def opening(url: str | None) -> Iterator[None]:
    """While the block runs, no other process of this kind opens the same SQLite file or server.

    Raises:
        InputError: what the block opens cannot be opened.
    """
    file = _file_of(url) if url is not None else None
    try:
        with ExitStack() as shut:
            if file is not None and file.parent.is_dir():
                shut.enter_context(FileLock(f"{file}.lock", timeout=_PATIENCE))
            elif file is None and gives_signs(url):
                shut.enter_context(_alone(str(url)))
            yield
    except InputError:
        raise
    except Exception as error:  # SQLAlchemy and its drivers have errors of many roots
        reason, where = " ".join(str(error).split())[:200], repr(shown(str(url)))
        full = any(word in reason.lower() for word in ("disk is full", "no space left"))  # SQLite, the system
        fix = "free some space" if full else "give an Optuna storage URL"
        raise InputError(f"cannot open the study storage {where}: {reason}; {fix}") from None


@contextmanager
def _alone(url: str) -> Iterator[None]:
    """A connection to a server that no other process has, of those that ask for it in this way."""
    with _driver_of(url):
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as link:
        for command in _ALONE.get(engine.dialect.name, ()):
            link.exec_driver_sql(command)
        yield


def check_storage(url: str | None) -> None:
    """Open a storage, before anything is measured for it.

    Raises:
        InputError: it cannot be opened.
    """
    with opening(url):
        if url is not None:
            shared(url)


def _file_of(url: str) -> Path | None:
    """The SQLite file that a URL names."""
    try:
        parts = sqlalchemy.make_url(url)
    except ArgumentError:  # Optuna says it
        return None
    name = parts.database if parts.get_backend_name() == "sqlite" else None
    return None if not name or ":memory:" in name else Path(name)
