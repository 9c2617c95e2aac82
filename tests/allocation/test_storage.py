"""Storages that several workers share: a real database server, a file of SQLite, a journal."""

import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy
from backbones import VIT_TINY, dense
from optuna.trial import TrialState

from sidt.allocation import search, storage
from sidt.allocation.storage import shown
from sidt.cost.budget import Budget
from sidt.importance import random

SERVER = shutil.which("initdb")


def judged(model):
    """A score of the sizes alone, which takes a moment."""
    time.sleep(0.05)
    return np.full(4, sum(block.mlp.fc1.out_features for block in model.blocks) / 1536)


def run(url, objective=judged, trials=16, **options):
    model, space = dense(VIT_TINY)
    scores = random(model, space=space)
    return search(model, scores, Budget(params=0.6), objective, trials=trials, storage=url, progress=False, **options)


@pytest.fixture
def soon(monkeypatch):
    """Workers count as gone after two seconds."""
    monkeypatch.setattr(storage, "_BEAT", 1)
    monkeypatch.setattr(storage, "_GRACE", 2)
    monkeypatch.setattr(storage, "_PAUSE", 0.2)


class Server:
    """A PostgreSQL of its own in a temporary folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sidt-pg-"))
        self.user = "nobody" if os.getuid() == 0 else None  # it refuses root
        if self.user:
            shutil.chown(self.folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.data = self.folder / "data"
        self.call(SERVER, "-D", self.data, "-U", "sidt", "--auth=trust", "--no-sync")
        self.start()
        self.url = f"postgresql+psycopg://sidt@127.0.0.1:{self.port}/postgres"

    def call(self, *command) -> None:
        subprocess.run([*map(str, command)], check=True, capture_output=True, user=self.user, cwd=self.folder)

    def start(self) -> None:
        program = Path(os.path.realpath(SERVER)).with_name("pg_ctl")
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        with open(self.folder / "log", "ab") as log:  # it goes on when pg_ctl ends, so no pipe
            subprocess.run(
                [program, "-D", self.data, "-o", options, "-w", "start"],
                check=True, stdout=log, stderr=log, user=self.user, cwd=self.folder,
            )  # fmt: skip

    def stop(self) -> None:
        self.call(Path(os.path.realpath(SERVER)).with_name("pg_ctl"), "-D", self.data, "-m", "fast", "-w", "stop")


@pytest.fixture
def server():
    if SERVER is None:
        pytest.skip("PostgreSQL's initdb is not in PATH")
    pytest.importorskip("psycopg", reason="pip install 'sidt[postgres]'")
    one = Server()
    yield one
    with contextlib.suppress(subprocess.CalledProcessError):
        one.stop()
    shutil.rmtree(one.folder)


def states(result):
    return [trial.state for trial in result.study.get_trials(deepcopy=False)]


def test_workers_are_killed_and_the_server_restarts_and_no_trial_is_lost(server, soon):
    context = multiprocessing.get_context("fork")
    at_work = context.Barrier(5)
    workers = [context.Process(target=run, args=(server.url, _after(at_work), 40)) for _ in range(4)]
    for worker in workers:
        worker.start()
    at_work.wait(timeout=120)  # all four have opened the new database, and are in a trial
    study = _wait_for_trials(server.url, 4)
    for worker in workers[:2]:
        worker.kill()
    server.stop()
    server.start()
    for worker in workers:
        worker.join(timeout=90)
    assert [worker.exitcode for worker in workers] == [-9, -9, 0, 0]
    time.sleep(2.5)
    result = run(server.url, trials=44)  # what the killed ones were at is tried again
    assert result.study.study_name == study
    ended = states(result)
    assert TrialState.RUNNING not in ended
    assert ended.count(TrialState.COMPLETE) + ended.count(TrialState.PRUNED) >= 44
    again = [t for t in result.study.trials if t.system_attrs.get("retry_history")]
    assert again and result.value >= result.plain_value


def _after(barrier):
    """``judged``, whose first trial begins once all workers have come so far."""
    waits = [barrier]

    def objective(model):
        if waits:
            waits.pop().wait(timeout=120)
        return judged(model)

    return objective


def _wait_for_trials(url, count):
    """The name of the only study there, once some of its trials have ended."""
    for _ in range(300):
        with contextlib.suppress(Exception):
            (found,) = optuna.get_all_study_summaries(url)
            if found.n_trials > count:
                return found.study_name
        time.sleep(0.1)
    raise AssertionError("no trials")


def _killed_in_its_first_trial(url):
    run(url, lambda model: os.kill(os.getpid(), 9))


def test_a_killed_workers_trial_is_failed_and_tried_again(tmp_path, soon):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    worker = multiprocessing.get_context("fork").Process(target=_killed_in_its_first_trial, args=(url,))
    worker.start()
    worker.join(timeout=60)
    time.sleep(3.5)  # SQLite's clock has whole seconds
    result = run(url, trials=3)
    ended = states(result)
    assert ended[0] == TrialState.FAIL and TrialState.RUNNING not in ended
    assert (
        result.study.trials[0].params
        and sum(t.params == result.study.trials[0].params for t in result.study.trials) == 2
    )


def test_a_trial_whose_worker_went_before_its_first_sign_is_tried_again(tmp_path, soon):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = run(url, trials=1).study
    silent = study.ask()  # as a worker has it before its trial runs
    run(url, trials=2)
    assert study.trials[silent.number].state == TrialState.RUNNING  # its worker may still be about to begin
    time.sleep(2.5)
    ended = states(run(url, trials=3))
    assert ended[silent.number] == TrialState.FAIL and TrialState.RUNNING not in ended
    assert any(t.system_attrs.get("retry_history") == [silent.number] for t in study.trials)


def test_a_journal_is_a_storage(tmp_path, refused):
    url = f"journal:///{tmp_path / 'study.log'}"
    first = run(url, trials=2)
    assert run(url, trials=3).study.study_name == first.study.study_name
    assert len(run(url, lambda model: pytest.fail("nothing is left to do"), trials=3).study.trials) >= 3
    with refused("nowhere"):
        run(f"journal:///{tmp_path / 'nowhere' / 'study.log'}", trials=1)


def test_a_missing_driver_is_named_and_no_password_is(refused, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setattr(sqlalchemy, "create_engine", missing)
    for url, extra in (
        ("postgresql://me:secret@host/db", "sidt[postgres]"),
        ("mysql+pymysql://a:b@c/d", "sidt[mysql]"),
    ):
        with refused(extra, shown(url)):
            run(url, trials=1)
    assert shown("postgresql://me:se:cr@t@host/db") == "postgresql://me:***@host/db"
    assert shown("sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"


def test_a_full_disk_is_told_from_a_wrong_url(tmp_path, refused):
    url = f"sqlite:///{tmp_path}/study.db"
    with refused("No space left", "free some space"), storage.opening(url):
        raise OSError(28, "No space left on device")
    with refused("disk is full", "free some space"), storage.opening(url):
        raise sqlalchemy.exc.OperationalError("PRAGMA", {}, Exception("database or disk is full"))
    with refused("no such file", "give an Optuna storage URL"), storage.opening(url):
        raise OSError(2, "no such file")
