"""Where a model runs: devices, accelerate, and their random state."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState, PartialState

from sidt.errors import InputError
from sidt.training.batches import seeded


def resolve_device(name: str) -> torch.device:
    """The device meant by ``auto``, ``cpu``, ``mps``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: this machine has no such device.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device is '{name}'; it must be auto, cpu, mps, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(f"device is '{name}', but torch sees {count} CUDA devices; use device=auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device is 'mps', but torch sees none here; use device=auto or cpu")
    return device


@contextmanager
def own_accelerator(device: torch.device, precision: str) -> Iterator[Accelerator]:
    """An Accelerator of our own: the class-wide state of any earlier one is set aside meanwhile."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    kinds = [AcceleratorState, GradientState] + ([PartialState] if alone else [])
    saved = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    try:
        with torch.cuda.device(device) if alone and device.type == "cuda" else nullcontext():
            yield Accelerator(
                cpu=device.type == "cpu",
                mixed_precision=precision,
                dataloader_config=DataLoaderConfiguration(split_batches=True),
                rng_types=[],  # every process draws the same from the loader's own generator already
            )
    finally:
        for kind, state in zip(kinds, saved, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


@contextmanager
def seeded_on(seed: int, device: torch.device) -> Iterator[None]:
    """Seed everything a training step draws from, and put the process's own generators back afterwards."""
    cuda = [torch.cuda.current_device()] if device.type == "cuda" else []
    with seeded(seed), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield
