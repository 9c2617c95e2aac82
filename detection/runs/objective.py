"""What a search stands on: scores by the detector's loss, and what its trials are judged by."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from sidt import importance as criteria
from sidt.allocation.study import Gain, Objective
from sidt.detection.detectors.configs import Source, with_data
from sidt.detection.runs.settings import Settings
from sidt.detection.training.evaluation import average_precision
from sidt.detection.training.gates import gate_scores
from sidt.detection.training.loss import detector_loss, minus_losses, read_batches
from sidt.files import read_json
from sidt.importance import Importance
from sidt.space.space import DimensionSpace
from sidt.surgery.alignment import align
from sidt.surgery.moments import Moments, measure_moments

Say = Callable[[str], None]


def measured_scores(
    detector: nn.Module, config: Config, settings: Settings, space: DimensionSpace, say: Say
) -> Importance:
    """The importance that the settings name; taylor, fisher and gates are of the detector's loss on training images."""
    if settings.score == "random":
        return criteria.random(detector, seed=settings.seed, space=space)
    if settings.score == "magnitude":
        return criteria.magnitude(detector, space=space)
    begin = time.perf_counter()
    if settings.score == "gates":
        found = gate_scores(detector, config, settings, space)
        say(f"scores: gates learned on the detector's loss, {time.perf_counter() - begin:.0f} s")
        return found
    batch = 1 if settings.score == "fisher" else int(config.train_dataloader.get("batch_size", 2))
    batches = read_batches(config, settings.score_images, batch_size=batch, seed=settings.seed)
    criterion = criteria.fisher if settings.score == "fisher" else criteria.taylor
    found = criterion(detector, batches, detector_loss, space=space)
    say(
        f"scores: {settings.score} of the detector's loss on {settings.score_images} images, "
        f"{time.perf_counter() - begin:.0f} s"
    )
    return found


def aligned_detector(
    detector: nn.Module, config: Config, settings: Settings, space: DimensionSpace
) -> tuple[nn.Module, Moments]:
    """The detector in the basis in which few units carry nearly everything, and what its repair stands on."""
    batch = int(config.train_dataloader.get("batch_size", 2))
    batches = read_batches(config, settings.score_images, batch_size=batch, seed=settings.seed)
    return align(detector, measure_moments(detector, batches, forward=detector_loss, space=space))


def objective(config: Config, settings: Settings, source: Source, annotations: Path, folds: int | None) -> Objective:
    """What a trial is judged by, on the training images of an annotation file."""
    if settings.objective == "loss":
        count = len(read_json(annotations)["images"])
        batches = read_batches(
            with_data(config, "train_dataloader", annotations), count, batch_size=1, seed=settings.seed
        )
        return lambda detector: minus_losses(detector, batches)
    loader = with_data(config, "test_dataloader", annotations, source.images).test_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    images = Runner.build_dataloader(loader, seed=0)

    def ap(detector: nn.Module) -> np.ndarray:
        with without_masks(detector):
            return average_precision(detector, images, annotations, source.classes, folds=folds)

    return ap


@contextmanager
def without_masks(detector: Any) -> Iterator[None]:
    """Box AP needs no masks, which are a fifth of the cost of a Mask R-CNN."""
    roi_head = getattr(detector, "roi_head", None)
    mask_head = getattr(roi_head, "mask_head", None)
    if mask_head is not None:
        roi_head.mask_head = None
    try:
        yield
    finally:
        if mask_head is not None:
            roi_head.mask_head = mask_head


def named(settings: Settings) -> str:
    """What trials are judged by."""
    return "box AP" if settings.objective == "ap" else "minus the detector's loss"


def shown(settings: Settings, value: float) -> str:
    """A trial's value as text."""
    return f"{value:.1%}" if settings.objective == "ap" else f"{value:.4f}"


def says(settings: Settings, gain: Gain) -> str:
    """Whether the search paid, in one sentence."""
    if settings.objective == "ap":
        return gain.sentence("{:+.2%}", "{:.2%}", f"{gain.samples} groups of fresh training images")
    return gain.sentence("{:+.4f}", "{:.4f}", f"{gain.samples} fresh training images")
