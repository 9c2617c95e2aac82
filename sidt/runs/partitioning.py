"""``sidt partition``: a model cut over devices, its shards as files, and what the devices and the cuts are worth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from sidt.data.preparation import preparation_of
from sidt.errors import InputError
from sidt.export.checkpoint import load
from sidt.files import write_bytes, write_json
from sidt.partition.devices import Device, DevicesFile
from sidt.partition.planner import Partition, partition
from sidt.partition.shards import assembled, difference, shard_of
from sidt.partition.workers import calibrate, run_partition
from sidt.partition.workload import Workload, workload_of
from sidt.report.tables import table
from sidt.runs.exports import result_of
from sidt.runs.folder import open_run
from sidt.settings import parse, read_yaml
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import InputSize, input_size_of

BOUND = 1e-5  # the largest difference from the whole model's output, as a part of its largest value above 1


def partition_source(source: Path, devices_file: Path, *, images: int = 1, measured: bool = False) -> str:
    """Cut the model that a source names over devices, write plan and shards, and say what comes of it.

    Args:
        source: a run folder (its fine-tuned model, else its sliced one), or a checkpoint folder.
        devices_file: a YAML file of :class:`sidt.partition.devices.DevicesFile`.
        images: in a batch.
        measured: run the shards too, a worker on this machine for each device.

    Returns:
        Tables: the devices, and what the run's result saves beside its dense model; and what was measured.

    Raises:
        InputError: the source has no model, a device no memory for any shard, or all together none for the model;
            or the shards do not compute what the model computes.
    """
    if images < 1:
        raise InputError(f"--images is {images}; a batch has one image at least")
    models, size = _models_of(source)
    devices = read_devices(devices_file)
    name, model = list(models.items())[-1]
    space = space_for(model, size)
    sample = torch.randn(images, *size, generator=torch.Generator().manual_seed(0))
    counted = workload_of(model, space, images)
    workload, devices = _complete(model, counted, devices, sample)
    cut = partition(workload, devices)
    with torch.no_grad():
        expected = model(sample)
        _check(name, assembled(model, space, cut)(sample), expected)
    files = write_partition(source / "partition", model, space, cut)
    text = [f"{name}, {images} of {'x'.join(map(str, size))} -> {source / 'partition'}", devices_table(cut)]
    text.append(_said(cut, devices))
    spaces = {each: space if each == name else space_for(models[each], size) for each in models}
    if len(models) > 1:
        loads = {each: workload_of(models[each], spaces[each], images) for each in models}
        text.append(savings_table(loads, devices))
    if measured:
        text.append(_measured(model, space, cut, files, sample, expected))
    return "\n\n".join(text)


def _models_of(source: Path) -> tuple[dict[str, nn.Module], InputSize]:
    """The models of a source, the one to cut last, and the size of their images."""
    if (source / "config.yaml").is_file():
        run, (name, folder) = open_run(source), result_of(source)
        small = load(folder)
        dense = {"dense": load(source / "dense")} if (source / "dense" / "config.json").is_file() else {}
        return dense | {name: small}, (input_size_of(small)[0], *preparation_of(run.config.data).size)
    if (source / "config.json").is_file():
        model, place = load(source), source.resolve()
        beside = place.parents[1] / "dense"  # of RUN/compressed/NAME
        there = place.parent.name == "compressed" and (beside / "config.json").is_file()
        return ({"dense": load(beside)} if there else {}) | {place.name: model}, input_size_of(model)
    raise InputError(f"{source} is no run folder and no checkpoint: it has neither config.yaml nor config.json")


def read_devices(path: Path) -> tuple[Device, ...]:
    """Read a file of devices.

    Raises:
        InputError: it is missing, not YAML, or a value cannot be used.
    """
    return parse(DevicesFile, read_yaml(path, DevicesFile, "list of devices"), str(path)).devices


def _complete(
    model: nn.Module, workload: Workload, devices: Sequence[Device], sample: Tensor
) -> tuple[Workload, tuple[Device, ...]]:
    """Devices that say all, with what a worker on this machine does where the file does not say it."""
    if all(d.macs_per_second is not None and d.bandwidth is not None for d in devices):
        return workload, tuple(devices)
    partition(workload, [d.model_copy(update={"macs_per_second": 1.0, "bandwidth": 1.0}) for d in devices])  # has room
    timed, here = calibrate(model, workload, devices, sample)
    found = []
    for device, measured in zip(devices, here, strict=True):
        missing: dict[str, float] = {}
        if device.macs_per_second is None:
            missing["macs_per_second"] = measured.capacity
        if device.bandwidth is None:
            missing |= {"bandwidth": measured.link, "latency": measured.latency}
        found.append(device.model_copy(update=missing))
    return timed, tuple(found)


def write_partition(folder: Path, model: nn.Module, space: DimensionSpace, cut: Partition) -> list[Path]:
    """Write ``partition.json`` and a file of tensors for each device; those of an earlier partition go.

    Returns:
        The files of the shards, in the order of the devices.
    """
    files = [folder / f"shard-{index}-{device.name}.safetensors" for index, device in enumerate(cut.devices)]
    for index, file in enumerate(files):
        state = {k: v.detach().contiguous().clone() for k, v in shard_of(model, space, cut, index).state_dict().items()}
        write_bytes(file, dump_tensors(state, metadata={"format": "pt", "device": cut.devices[index].name}))
    says = cut.to_json()
    for entry, file in zip(says["devices"], files, strict=True):
        entry["shard"] = file.name
    write_json(folder / "partition.json", {**says, "model": space.model})
    for old in set(folder.glob("shard-*.safetensors")) - set(files):
        old.unlink()
    return files


def devices_table(cut: Partition) -> str:
    """What each device has of the model, and what it takes."""
    kinds = list(dict.fromkeys(grid.sublayer.kind for grid in cut.grids))
    rows: list[list[Any]] = []
    for index, device in enumerate(cut.devices):
        shares = ["{:.0%} x {:.0%}".format(*cut.share(index, kind)) for kind in kinds]
        compute, link = cut.times(index)
        held, moved = cut.shard_bytes(index), cut.moved(index)
        rows.append([device.name, *shares, held, f"{compute * 1e3:.2f}", f"{link * 1e3:.2f}", moved])
    named = [f"{kind}: rows x units" for kind in kinds]
    return table(["device", *named, "parameter bytes", "compute ms", "link ms", "bytes moved"], rows)


def _said(cut: Partition, devices: Sequence[Device]) -> str:
    """The prediction in words."""
    fastest = max(cut.devices, key=lambda d: d.capacity)
    fits = "which has the memory" if fastest.memory >= cut.workload.bytes else "which has not the memory"
    left = [d.name for d in devices if d.name not in {own.name for own in cut.devices}]
    words = (
        f"Predicted: {cut.seconds * 1e3:.2f} ms a batch; {fastest.name} alone, {fits}: {cut.alone * 1e3:.2f} ms, "
        f"so {cut.alone / cut.seconds:.2f} times its speed."
    )
    return words + (f" Without {', '.join(left)}, which would slow the others." if left else "")


def savings_table(loads: Mapping[str, Workload], devices: Sequence[Device]) -> str:
    """Models on the same devices, each with a plan of its own, beside the first: time, bytes moved, bytes to ship.

    MeDNN's structured sparsity (SMCD) trains units to zero and slices them; what that saves on the devices is here.
    """
    rows: list[list[Any]] = []
    first: tuple[float, ...] | None = None
    for name, workload in loads.items():
        try:
            cut = partition(workload, devices)
        except InputError:
            rows.append([name, "has no room", "-", "-"])
            continue
        indices = range(len(cut.devices))
        values = (cut.seconds * 1e3, sum(map(cut.moved, indices)), sum(map(cut.shard_bytes, indices)))
        first = values if first is None and not rows else first
        cells = [f"{values[0]:.2f}", f"{values[1]:,}", f"{values[2]:,}"]
        if first is not None and first is not values:
            cells = [f"{c} ({v / f - 1:+.1%})" if f else c for c, v, f in zip(cells, values, first, strict=True)]
        rows.append([name, *cells])
    return table(["model", "predicted ms", "bytes moved", "parameter bytes"], rows)


def _measured(
    model: nn.Module, space: DimensionSpace, cut: Partition, files: Sequence[Path], sample: Tensor, expected: Tensor
) -> str:
    """Run the shards from their files and the whole model, both by workers on this machine, and say what they took."""
    shards = []
    for index, file in enumerate(files):
        shard = shard_of(model, space, cut, index)
        shard.load_state_dict(load_file(file))
        shards.append(shard)
    found = run_partition(model, space, cut, shards, sample)
    error = _check("what the workers give", found.output, expected)
    whole = partition(cut.workload, [cut.devices[0].model_copy(update={"memory": float(cut.workload.bytes)})])
    alone = run_partition(model, space, whole, [model], sample)
    predicted = found.predicted.seconds
    return (
        f"Measured here, {len(files)} workers of {', '.join(str(d.threads) for d in cut.devices)} threads: "
        f"{found.seconds * 1e3:.2f} ms a batch, {predicted * 1e3:.2f} ms predicted from its pieces here "
        f"({predicted / found.seconds - 1:+.1%}); one worker alone {alone.seconds * 1e3:.2f} ms, so "
        f"{alone.seconds / found.seconds:.2f} times its speed. Largest difference from the whole model: {error:.1e}."
    )


def _check(name: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference.

    Raises:
        InputError: it is above the bound.
    """
    error = difference(found, expected)
    if not error <= BOUND:
        raise InputError(f"{name}: the shards together differ from the whole model by {error:.1e}, above {BOUND:g}")
    return error
