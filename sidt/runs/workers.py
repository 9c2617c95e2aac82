"""Processes of this machine that work on one study together."""

import io
import multiprocessing
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from multiprocessing.synchronize import Event

import torch

from sidt.errors import InputError

# What one of several processes does: it is given its number, and what waits until the trials begin.
Work = Callable[[int, Callable[[], object]], None]
_SEEDS = 1_000_003  # between the seeds of workers, which would draw the same otherwise


def seed_of(worker: int, seed: int) -> int:
    """The seed of one of several processes; that of the first, number 0, is the study's own."""
    return seed + _SEEDS * worker


@contextmanager
def helped(work: Work, count: int, *, at_once: bool) -> Iterator[Callable[[], None]]:
    """While the block runs, so do other processes: ``count`` in all, alike in threads.

    Their trials begin when the block calls what it is given. One that dies costs the trial that it was at, which the
    others try again; if this process dies, the others end.

    Args:
        work: what the others do; it is pickled if there are any.
        count: processes, this one included.
        at_once: whether they start with the block, and load what they need while it prepares; else with the trials,
            where the block measures what they read, or times.
    """
    threads, context = torch.get_num_threads(), multiprocessing.get_context("spawn")
    share, begun, pickled = max(1, threads // count), context.Event(), pickle.dumps(work) if count > 1 else b""
    helpers = [context.Process(target=_help, args=(pickled, i, share, begun), daemon=True) for i in range(1, count)]

    def start() -> None:
        for helper in helpers:
            helper.start()

    def begin() -> None:
        torch.set_num_threads(share)
        if not at_once:
            start()
        begun.set()

    try:
        if at_once:
            start()
        yield begin
        for helper in helpers:
            helper.join()
    finally:
        torch.set_num_threads(threads)
        for helper in helpers:
            if helper.pid is not None:
                helper.terminate()
                helper.join()


def _help(pickled: bytes, worker: int, threads: int, begun: Event) -> None:
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        # What packages tell as they are imported, the first process has heard.
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work: Work = pickle.loads(pickled)
        work(worker, begun.wait)
    except KeyboardInterrupt:  # the first process says it
        raise SystemExit(0) from None
    except InputError as error:
        raise SystemExit(f"worker {worker + 1}: {error}") from None


def _end_with_the_first() -> None:
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()  # a killed one tells nobody
    os._exit(1)
