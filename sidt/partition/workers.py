"""The partitioned model on this machine: a worker for each device, what it takes, and what its pieces say it takes.

Workers stand in for devices; they share this machine's cores and its memory. So their pieces are timed with all of
them at work, in turn with the partitioned model (:mod:`sidt.partition.pieces`): four on two cores have half a core
each, and what else the machine does slows both.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidt.partition.devices import Device
from sidt.partition.exchange import exchange
from sidt.partition.pieces import Pieces, probes, time_pieces
from sidt.partition.planner import Partition
from sidt.partition.processes import run_together
from sidt.partition.shards import joined
from sidt.partition.workload import Workload
from sidt.space.space import DimensionSpace
from sidt.space.trace import meta_copy

TIMEOUT = 600.0  # seconds until workers that have not ended are ended
_NO_LINK = 1e12  # bytes a second of a device that sends to nobody
Packed = tuple[nn.Module, bytes]  # a module without storage, and its tensors in one piece


@dataclass(frozen=True)
class Measured:
    """What workers gave and took.

    Attributes:
        output: of the partitioned model, [images, ...].
        seconds: median of the rounds, each as long as its slowest worker.
        predicted: the partition with the loads and devices that the pieces say, timed in turn with it.
    """

    output: Tensor
    seconds: float
    predicted: Partition


@dataclass(frozen=True)
class _Task:
    """What a worker is given: the whole model, its own shard if there is one, and a batch if it is the first."""

    model: Packed
    owners: tuple[str, ...]
    stream: int
    sample: Any
    rounds: int
    shard: Packed | None = None
    space: DimensionSpace | None = None
    partition: Partition | None = None
    index: int = 0


def run_partition(
    model: nn.Module,
    space: DimensionSpace,
    partition: Partition,
    shards: Sequence[nn.Module],
    images: Tensor,
    *,
    rounds: int = 5,
    timeout: float = TIMEOUT,
) -> Measured:
    """Run a partitioned model, a worker on this machine for each device.

    Args:
        model: the model that was cut, whose pieces are timed.
        space: its space.
        partition: of it.
        shards: of :func:`shard_of`, one for each device.
        images: a batch of as many as the partition was made for; the first worker sends it to the others.
        rounds: forwards that are timed.
        timeout: seconds until the workers are ended.

    Raises:
        InputError: the batch is of another size, or the workers did not end in time.
        RuntimeError: a worker failed.
    """
    task = _task(model, partition.workload, images, rounds)
    tasks = [
        replace(task, shard=_packed(shard), space=space, partition=partition, index=index)
        for index, shard in enumerate(shards)
    ]
    found = _at_work(tasks, partition.devices, timeout)
    slowest = [max(times) for times in zip(*(seconds for _, seconds, _ in found), strict=True)]
    there = _devices_of([pieces for *_, pieces in found], partition.workload, partition.devices, task.stream)
    return Measured(torch.from_numpy(found[0][0]), median(slowest), partition.on(*there))


def calibrate(
    model: nn.Module,
    workload: Workload,
    devices: Sequence[Device],
    images: Tensor,
    *,
    rounds: int = 5,
    timeout: float = TIMEOUT,
) -> tuple[Workload, tuple[Device, ...]]:
    """What workers on this machine can do while all of them work, each with the threads of its device.

    Args:
        model: the whole model, which each of them runs.
        workload: of it.
        devices: those that the workers stand for.
        images: a batch.
        rounds: forwards that are timed.
        timeout: seconds until the workers are ended.

    Returns:
        The workload as it is in time, not in counted multiply-adds, and the devices with the capacity, the bandwidth
        and the latency that were measured.

    Raises:
        InputError: the workers did not end in time.
        RuntimeError: a worker failed.
    """
    task = _task(model, workload, images, rounds)
    found = _at_work([task] * len(devices), devices, timeout)
    return _devices_of([pieces for *_, pieces in found], workload, devices, task.stream)


def _task(model: nn.Module, workload: Workload, images: Tensor, rounds: int) -> _Task:
    largest = max(s.rows * s.row_bytes for s in workload.sublayers)
    return _Task(_packed(model), tuple(s.owner for s in workload.sublayers), largest, images.numpy(), rounds)


def _at_work(tasks: Sequence[_Task], devices: Sequence[Device], timeout: float) -> list[Any]:
    return run_together(_work, [(task,) for task in tasks], [d.threads for d in devices], timeout)


def _devices_of(
    pieces: Sequence[Sequence[Pieces]], workload: Workload, devices: Sequence[Device], stream: int
) -> tuple[Workload, tuple[Device, ...]]:
    """Loads and devices from the pieces of each worker and round.

    A sublayer takes as long as the worker who is slowest in that round, beside its own mean speed: on shared cores it
    is another one each time. What interrupts now and then shows in a round and in no median of a piece, so that pieces
    are added up in each round.
    """
    own = [median(sum(p.layers) for p in rounds) for rounds in pieces]
    slowest = [
        [max(p.layers[i] / s for p, s in zip(together, own, strict=True)) for i in range(len(together[0].layers))]
        for together in zip(*pieces, strict=True)
    ]
    whole = median(map(sum, slowest))
    parts = [median(layer) for layer in zip(*slowest, strict=True)]
    loads = [whole * part / sum(parts) for part in parts]
    timed = workload.timed(whole, {s.owner: load for s, load in zip(workload.sublayers, loads[:-1], strict=True)})
    link: dict[str, float] = {"bandwidth": _NO_LINK, "latency": 0.0}
    if len(devices) > 1:
        small, large = (median(getattr(p, size) for rounds in pieces for p in rounds) for size in ("small", "large"))
        moved = [grid.moved(0) for grid in probes(len(devices), stream)]
        # What is small waits for a core as what is large does: at least half of the latter is its bytes.
        link = {"bandwidth": (moved[1] - moved[0]) / max(large - small, large / 2), "latency": small / 2}
    return timed, tuple(
        device.model_copy(update={"macs_per_second": workload.macs / (whole * seconds), **link})
        for device, seconds in zip(devices, own, strict=True)
    )


def _work(task: _Task) -> tuple[Any, list[float], list[Pieces]]:
    """In a worker: the output, the seconds of each round, and its pieces; a first round is not counted."""
    model, given = _unpacked(task.model), torch.from_numpy(task.sample)
    shard = None
    if task.shard is not None:
        assert task.space is not None and task.partition is not None
        shard = joined(_unpacked(task.shard), task.space, task.partition, task.index, exchange)
    output, seconds, pieces = None, [], []
    for _ in range(task.rounds + 1):
        pieces.append(time_pieces(model, task.owners, given, task.stream))
        if shard is not None:
            images = given.clone() if task.index == 0 else torch.empty_like(given)
            dist.barrier()
            begin = time.perf_counter()
            dist.broadcast(images, 0)
            output = shard(images)
            seconds.append(time.perf_counter() - begin)
    return None if output is None else output.numpy(), seconds[1:], pieces[1:]


def _packed(model: nn.Module) -> Packed:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return meta_copy(model), safetensors.torch.save({k: v.detach().contiguous().clone() for k, v in tensors.items()})


def _unpacked(packed: Packed) -> nn.Module:
    model, data = packed
    tensors = safetensors.torch.load(data)
    model.to_empty(device="cpu")
    for name, own in [*model.named_parameters(), *model.named_buffers()]:
        own.copy_(tensors[name])
    return model.eval()
