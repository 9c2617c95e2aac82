"""The images of a run: what calibrates, what trials are judged on."""

from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from sidt.runs.folder import Run
from sidt.training.data import Splits, load_data
from sidt.training.preparation import DataConfig


@lru_cache(maxsize=1)
def data_of(config: DataConfig) -> Splits:
    """The data, read once for all steps of a process."""
    return load_data(config)


def held_out_images(run: Run) -> Dataset[Any]:
    """The held-out images that trials are judged on."""
    data, count = data_of(run.config.data), run.config.search.images
    return data.holdout if count is None else sample(data.holdout, count)


def sample(data: Dataset[Any], count: int) -> Subset[Any]:
    """The same ``count`` samples every time, drawn from all of the data; all of it if there are fewer."""
    order = np.random.default_rng(0).permutation(len(data))  # type: ignore[arg-type]
    return Subset(data, order[:count].tolist())
