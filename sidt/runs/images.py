"""The images of a run: what calibrates, what trials are judged on."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from sidt.data.loading import Splits, broken_images, load_data
from sidt.data.preparation import DataConfig
from sidt.data.sources import DataError
from sidt.errors import InputError
from sidt.runs.folder import Run


@lru_cache(maxsize=1)
def data_of(config: DataConfig) -> Splits:
    """The data, read once for all steps of a process."""
    return load_data(config)


@contextmanager
def naming_broken(run: Run) -> Iterator[None]:
    """Where an image of a run cannot be decoded, look for all that cannot.

    Raises:
        InputError: with the names of all of them.
    """
    try:
        yield
    except DataError as error:
        names = broken_images(data_of(run.config.data))
        if not names:  # the disk, say, and not the image
            raise
        raise InputError(
            f"{len(names)} images cannot be decoded: {', '.join(names)}; remove or replace them, or leave them out "
            "with --set data.skip_broken=true (sidt shrink: --skip-broken)"
        ) from error


def held_out_images(run: Run) -> Dataset[Any]:
    """The held-out images that trials are judged on."""
    data, count = data_of(run.config.data), run.config.search.images
    return data.holdout if count is None else sample(data.holdout, count)


def sample(data: Dataset[Any], count: int) -> Subset[Any]:
    """The same ``count`` samples every time, drawn from all of the data; all of it if there are fewer."""
    order = np.random.default_rng(0).permutation(len(data))  # type: ignore[arg-type]
    return Subset(data, order[:count].tolist())
