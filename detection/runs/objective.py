"""What a search stands on: scores by the detector's loss, and what its trials are judged by."""

import copy
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.runner import Runner
from safetensors.torch import save as dump_tensors
from torch import nn

from sidt.allocation.study import Gain
from sidt.detection.data.images import naming_images
from sidt.detection.data.sources import Source, with_data
from sidt.detection.detectors.checkpoints import WEIGHTS, load_weights
from sidt.detection.runs.settings import Settings
from sidt.detection.training.evaluation import average_precision, check_folds
from sidt.detection.training.loop import train
from sidt.detection.training.loss import detector_loss, minus_losses, read_batches
from sidt.files import read_json, replacing
from sidt.importance import criteria
from sidt.importance.scores import Importance, load_importance
from sidt.space.space import DimensionSpace
from sidt.surgery.alignment import align
from sidt.surgery.moments import Moments, load_moments, measure_moments
from sidt.surgery.rotation import rotatable

Say = Callable[[str], None]


Batches = Callable[[int], list[Any]]  # batch size -> the training images that scores and moments are measured on


def images_of(config: Config, settings: Settings) -> Batches:
    """The images of scores and moments, read once for each batch size."""
    return lru_cache(lambda size: read_batches(config, settings.score_images, batch_size=size, seed=settings.seed))


def batch_size(config: Config) -> int:
    """The batch size of a config's training."""
    return int(config.train_dataloader.get("batch_size", 2))


def measured_scores(
    detector: nn.Module, config: Config, settings: Settings, space: DimensionSpace, images: Batches, say: Say
) -> Importance:
    """The importance that the settings name; taylor, fisher and gates are of the detector's loss on training images."""
    if settings.score == "random":
        return criteria.random(detector, seed=settings.seed, space=space)
    if settings.score == "magnitude":
        return criteria.magnitude(detector, space=space)
    begin = time.perf_counter()
    if settings.score == "gates":
        found = _gate_scores(detector, config, settings, space)
        say(f"scores: gates learned on the detector's loss, {time.perf_counter() - begin:.0f} s")
        return found
    batches = images(1 if settings.score == "fisher" else batch_size(config))
    criterion = criteria.fisher if settings.score == "fisher" else criteria.taylor
    found = criterion(detector, batches, detector_loss, space=space)
    say(
        f"scores: {settings.score} of the detector's loss on {settings.score_images} images, "
        f"{time.perf_counter() - begin:.0f} s"
    )
    return found


def _gate_scores(detector: nn.Module, config: Config, settings: Settings, space: DimensionSpace) -> Importance:
    """Scores by gates that are learned on the training data of a config; the detector is left as it is.

    The training, by MMEngine, starts from the detector's weights and is thrown away but for the scores.
    """
    own = Config(config.to_dict(), filename=config.filename)
    own.merge_from_dict(copy.deepcopy(settings.gates.train))  # which it changes
    own.val_cfg = own.val_dataloader = own.val_evaluator = None
    with tempfile.TemporaryDirectory() as folder:
        start, out = Path(folder, "start.safetensors"), Path(folder, "scores.safetensors")
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in detector.state_dict().items()}
        start.write_bytes(dump_tensors(state))
        hook = {"type": "GateHook", "kinds": settings.searched, "out": str(out), "outside": settings.on == "detector"}
        hook |= settings.gates.model_dump(exclude={"train"})
        own.custom_hooks = [*(own.get("custom_hooks") or []), hook]
        train(own, start, Path(folder, "states"), "gates")
        return load_importance(out, space)


def aligned_detector(
    detector: nn.Module, space: DimensionSpace, read: Callable[[], list[Any]], folder: Path, made_of: Mapping[str, Any]
) -> tuple[nn.Module, Moments]:
    """The detector in the basis in which few units carry nearly everything, and what its repair stands on.

    Both are measured once, and kept in ``folder`` with what they were ``made_of``. They are read from there the first
    time too: a search that goes on needs the very same, to the last bit.
    """
    weights, measured = folder / WEIGHTS, folder / "moments.safetensors"
    widths = tuple(rotatable(space))
    made_of = {**made_of, "rotated": list(widths)}
    moments = load_moments(measured, space.ordered(widths), made_of)
    if moments is None or not weights.is_file():
        aligned, moments = align(detector, measure_moments(detector, read(), forward=detector_loss, space=space))
        measured.unlink(missing_ok=True)  # between the two files, neither counts
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in aligned.state_dict().items()}
        with replacing(weights) as temporary:
            temporary.write_bytes(dump_tensors(state, metadata={"format": "pt"}))
        moments.save(measured, made_of)
        moments = load_moments(measured, space.ordered(widths), made_of) or moments
    aligned = copy.deepcopy(detector)
    load_weights(aligned, weights)
    aligned.sidt_rotated = widths  # type: ignore[assignment]
    return aligned, moments


def objective(
    config: Config, settings: Settings, source: Source, annotations: Path, folds: int | None
) -> Callable[[nn.Module], np.ndarray]:
    """What a trial is judged by, on the training images of an annotation file."""
    if settings.objective == "loss":
        count = len(read_json(annotations)["images"])
        batches = read_batches(
            with_data(config, "train_dataloader", annotations), count, batch_size=1, seed=settings.seed
        )
        return lambda detector: minus_losses(detector, batches)
    check_folds(annotations, source.classes, folds)  # before hours of trials
    own = with_data(config, "test_dataloader", annotations, source.images)
    loader = own.test_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    with redirect_stdout(io.StringIO()):  # pycocotools talks
        images = Runner.build_dataloader(loader, seed=0)

    def ap(detector: nn.Module) -> np.ndarray:
        with without_masks(detector), naming_images(own, "test_dataloader"):
            return average_precision(detector, images, annotations, source.classes, folds=folds)

    return ap


@contextmanager
def without_masks(detector: Any) -> Iterator[None]:
    """Box AP needs no masks, which are a fifth of the cost of a Mask R-CNN."""
    roi_head: Any = getattr(detector, "roi_head", None)
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
