"""The detector's own loss, as a function of a model and a batch: what importance and the search stand on."""

import copy
import io
from contextlib import redirect_stdout
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

from sidt.detection.data.images import naming_images
from sidt.errors import InputError
from sidt.training.batches import seeded
from sidt.training.devices import seeded_on


def detector_loss(detector: nn.Module, batch: Any) -> Tensor:
    """The sum of all losses of a detector on one batch of its training data.

    Heads that sample boxes draw the same ones whenever they see the same batch, so losses can be compared.
    """
    device = next(detector.parameters()).device
    model: Any = detector
    with seeded_on(0, device):
        data = model.data_preprocessor(copy.deepcopy(batch), True)  # it changes the samples that it is given
        losses = model(**data, mode="loss")
    total: Tensor = model.parse_losses(losses)[0]
    return total


def read_batches(config: Config, images: int, *, batch_size: int, seed: int = 0) -> list[Any]:
    """The first images of the training data in a seeded order, through its pipeline, as batches kept in memory.

    Raises:
        InputError: no image is left by the config's filters.
    """
    loader = copy.deepcopy(config.train_dataloader)
    loader.update(batch_size=batch_size, num_workers=0, persistent_workers=False, drop_last=False)
    loader.sampler = {"type": "DefaultSampler", "shuffle": True, "seed": seed}
    loader.pop("batch_sampler", None)
    with seeded(seed), naming_images(config, "train_dataloader"), redirect_stdout(io.StringIO()):  # pycocotools talks
        found = list(islice(Runner.build_dataloader(loader, seed=seed), -(-images // batch_size)))
    if not found:
        raise InputError(f"{loader.dataset.get('ann_file')} gives no training image with boxes; check filter_cfg")
    return found


def minus_losses(detector: nn.Module, batches: list[Any]) -> npt.NDArray[np.float64]:
    """The negative loss of every batch, for a search that maximises; the model's training mode comes back."""
    training = detector.training
    detector.eval()
    try:
        with torch.no_grad():
            return np.array([-float(detector_loss(detector, batch)) for batch in batches])
    finally:
        detector.train(training)
