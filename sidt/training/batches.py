"""Batches of any data set, the same for the same seed whatever the number of workers."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sidt.errors import InputError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what augmentations draw from; afterwards the process's own generators are as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset CUDA's generator as well
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


class _SeededSampler(Sampler[tuple[int, int]]):
    """Indices, each with a seed for its augmentation, so that workers change nothing; new ones every pass."""

    def __init__(self, count: int, shuffle: bool, seed: int) -> None:
        self.count, self.shuffle = count, shuffle
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.count, generator=self.generator) if self.shuffle else torch.arange(self.count)
        seeds = torch.randint(2**62, (self.count,), generator=self.generator)
        yield from zip(order.tolist(), seeds.tolist(), strict=True)


class _SeededItems(Dataset[tuple[Tensor, int]]):
    """A data set whose indices come from ``_SeededSampler``."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        indices = [index for index, _ in keys]
        with seeded(keys[0][1]):
            if hasattr(self.data, "__getitems__"):
                items: list[tuple[Tensor, int]] = self.data.__getitems__(indices)
                return items
            return [self.data[index] for index in indices]


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 0,
    seed: int = 0,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """Batches of a data set: images, float B x 3 x S x S, and labels, int64 B.

    Order and augmentation depend on ``seed`` and on how often the loader was iterated before, on nothing
    else: not on the number of workers, nor on the process's own random state.
    """
    return DataLoader(
        _SeededItems(dataset),
        batch_size=batch_size,
        sampler=_SeededSampler(len(dataset), shuffle, seed),  # type: ignore[arg-type]
        num_workers=workers,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),  # else torch draws from the process's own
    )


def rechunk(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Regroup (images, targets) batches into groups of ``size`` samples, in order; the last may be smaller.

    Raises:
        InputError: ``size`` is below 1.
    """
    if size < 1:
        raise InputError(f"group size is {size}; it must be at least 1")
    waiting: list[tuple[Tensor, Tensor]] = []
    missing = size
    for images, targets in batches:
        while len(images):
            waiting.append((images[:missing], targets[:missing]))
            images, targets = images[missing:], targets[missing:]
            missing -= len(waiting[-1][0])
            if not missing:
                yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
                waiting, missing = [], size
    if waiting:
        yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
