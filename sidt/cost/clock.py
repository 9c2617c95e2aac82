"""The clock: what time a forward and the modules in it take, and on which machine."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sidt.space.space import DimensionSpace
from sidt.space.trace import Forward

_TURN = 0.02  # seconds of a turn: short calls are repeated


def whereabouts(model: nn.Module, space: DimensionSpace, batch: int) -> dict[str, Any]:
    """What a latency depends on besides the plan, for a model on its device."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    clock = {time.thread_time: "the thread's own", time.perf_counter: "wall"}[_cpu_clock()]
    return {
        "machine": name,
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "clock": clock if device.type == "cpu" else "events",
        "batch": batch,
        "input": list(space.trace.input_size),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The name of the CPU, and its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())}, {os.cpu_count()} cores"


def _cpu_clock() -> Callable[[], float]:
    """With one thread its own time, in which other programs do not show; else, or where that is coarse, the wall's."""
    fine = time.get_clock_info("thread_time").resolution <= 1e-6
    return time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 15, seconds: float = 20.0
) -> dict[str, float]:
    """Median milliseconds of some calls on the CPU, timed in turn, so that a busy machine slows all of them alike.

    Args:
        calls: what is timed, by name.
        rounds: how often each has its turn; fewer, but three at least, where they would take longer than ``seconds``.
        seconds: see ``rounds``.
    """
    clock, end = _cpu_clock(), time.perf_counter() + seconds
    repeats, found = {}, {name: list[float]() for name in calls}
    for name, call in calls.items():
        call()  # warm-up
        begin = clock()
        call()
        repeats[name] = max(1, int(_TURN / max(clock() - begin, 1e-6)))
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            begin = clock()
            for _ in range(repeats[name]):
                call()
            found[name].append((clock() - begin) / repeats[name] * 1e3)
    return {name: median(times) for name, times in found.items()}


def _mark(device: torch.device) -> Any:
    """A point in the time of a device: seconds on CPU, elsewhere an event, so that nothing waits for it."""
    if device.type == "cpu":
        return _cpu_clock()()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    """Milliseconds between two marks."""
    return float(second - first) * 1e3 if isinstance(first, float) else float(first.elapsed_time(second))


def time_layers(model: nn.Module, layers: Sequence[str], images: Tensor, forward: Forward) -> list[float]:
    """Milliseconds of one forward, and of each of some modules in it; of a module that is called twice, both.

    Of a module that has another of them inside, what it takes beside that.
    """
    marks: dict[str, list[Any]] = {name: [] for name in layers}
    with ExitStack() as stack:
        for name in layers:
            module, own = model.get_submodule(name), marks[name]
            before = module.register_forward_pre_hook(lambda *_, own=own: own.append(_mark(images.device)))
            after = module.register_forward_hook(lambda *_, own=own: own.append(_mark(images.device)))
            stack.callback(before.remove)
            stack.callback(after.remove)
        begin = _mark(images.device)
        forward(model, images)
        end = _mark(images.device)
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    taken = {n: sum(map(_between, marks[n][::2], marks[n][1::2])) for n in layers}
    inside = {n: sum(t for inner, t in taken.items() if inner.startswith(f"{n}.")) for n in layers}
    return [_between(begin, end), *(taken[n] - inside[n] for n in layers)]
