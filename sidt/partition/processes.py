"""Processes on this machine that run together, connected by ``torch.distributed`` (gloo, over the loopback)."""

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from sidt.errors import InputError

_GRACE = 1.0  # seconds after an error, in which others say theirs: the first need not be the cause


def run_together(
    work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], threads: Sequence[int], timeout: float
) -> list[Any]:
    """Run a function in several processes at once, each of which knows its rank and can reach the others.

    Args:
        work: a function of a module; what it returns is sent back.
        arguments: its arguments in each process.
        threads: torch's threads in each.
        timeout: seconds after which all are ended.

    Returns:
        What each has returned.

    Raises:
        InputError: one of them raised it, or they did not end in time.
        RuntimeError: one of them raised something else, or died.
    """
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        try:
            for rank, given in enumerate(arguments):
                here, there = context.Pipe(duplex=False)
                meeting = (str(Path(folder) / "store"), rank, len(arguments), threads[rank], timeout)
                process = context.Process(target=_worker, args=(there, meeting, work, given), daemon=True)
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            return _results(pipes, end, timeout)
        finally:
            for process in processes:
                process.join(timeout=5 if process.exitcode is None and time.monotonic() < end else 0)
                process.kill()
                process.join()


def _results(pipes: Sequence[Connection], end: float, timeout: float) -> list[Any]:
    """What comes out of the pipes, one from each; an error ends the wait."""
    found: dict[int, tuple[str, Any]] = {}
    wrong = False
    while len(found) < len(pipes):
        ready = wait([p for i, p in enumerate(pipes) if i not in found], max(end - time.monotonic(), 0.0))
        if not ready and not wrong:
            raise InputError(
                f"{len(pipes) - len(found)} of {len(pipes)} workers did not end within {timeout:g} s; give smaller "
                f"batches, or fewer workers"
            )
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                found[pipes.index(pipe)] = pipe.recv()
            except EOFError:
                found[pipes.index(pipe)] = ("died", "died; was its memory too small?")
        if not wrong and any(kind != "done" for kind, _ in found.values()):
            wrong, end = True, min(end, time.monotonic() + _GRACE)
    for kind in ("input", "died", "error"):  # others fail too once one has
        for rank, (seen, value) in found.items():
            if seen == kind:
                raise InputError(value) if kind == "input" else RuntimeError(f"worker {rank} {value}")
    return [found[rank][1] for rank in range(len(pipes))]


def _worker(
    pipe: Connection,
    meeting: tuple[str, int, int, int, float],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """What a process does: it meets the others, works, and says what came out."""
    store, rank, size, threads, timeout = meeting
    try:
        torch.set_num_threads(threads)
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        if loopback is not None:  # gloo would look up the machine's name, which need not be there
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        dist.init_process_group(
            "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        with torch.no_grad():
            result = work(*arguments)
        pipe.send(("done", result))
        dist.barrier()  # nobody leaves while others still read from it
        dist.destroy_process_group()
    except InputError as error:
        _say(pipe, "input", str(error))
    except Exception:
        _say(pipe, "error", f"failed:\n{traceback.format_exc()}")


def _say(pipe: Connection, kind: str, text: str) -> None:
    with suppress(OSError):  # nobody listens any longer
        pipe.send((kind, text))
