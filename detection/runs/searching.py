"""The study of a detection run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mmengine.config import Config
from torch import nn

from sidt.allocation.greedy import Rules
from sidt.allocation.study import SearchResult
from sidt.allocation.study import search as optuna_search
from sidt.allocation.timing import latencies_for
from sidt.cost.latency import LayerLatencies
from sidt.detection.data.sources import Source, with_data
from sidt.detection.detectors.checkpoints import WEIGHTS, load_detector, weights_digest
from sidt.detection.detectors.pyramid import only_layers
from sidt.detection.detectors.space import detector_space, predict, run_backbone, whole
from sidt.detection.runs.data import TRAIN, checked, split_data
from sidt.detection.runs.folder import DetectionRun, input_size, open_detector
from sidt.detection.runs.objective import (
    Batches,
    Say,
    aligned_detector,
    batch_size,
    images_of,
    measured_scores,
    named,
    objective,
)
from sidt.detection.runs.settings import Settings
from sidt.errors import InputError
from sidt.files import read_json, write_json
from sidt.importance.scores import Importance, load_importance
from sidt.runs.workers import seed_of
from sidt.space.families import KINDS
from sidt.space.finding import use_spaces
from sidt.space.space import DimensionSpace
from sidt.surgery.compensation import compensate
from sidt.surgery.slicing import slice_model
from sidt.training.devices import resolve_device

_FOLDS = 10  # groups of fresh images whose APs tell how sure a difference is
Judge = Callable[[nn.Module], np.ndarray]


@dataclass(frozen=True)
class Question:
    """What a run's search is asked.

    Attributes:
        detector: the dense one, in the basis of the scores.
        original: its config, as its own folder has it.
        source: the training data.
        space: the dimensions that are searched.
        scores: their importance.
        latencies: of the layers, for a budget with one.
        images: those of scores and moments.
        slicer: makes the detector of a plan.
        judge: what trials are judged by.
        judged_by: the same in words.
        fresh: makes the same on as many other images.
    """

    detector: nn.Module
    original: Config
    source: Source
    space: DimensionSpace
    scores: Importance
    latencies: LayerLatencies | None
    images: Batches
    slicer: Callable[..., nn.Module]
    judge: Judge
    judged_by: str
    fresh: Callable[[], Judge]


def question_of(run: DetectionRun, say: Say) -> Question:
    """What a run's search is asked; what it stands on is measured once, and kept in the run's folder."""
    settings = run.settings
    assert settings.budget is not None
    detector, config = open_detector(run, run.folder / "dense")
    original = load_detector(run.folder / "dense")[1]
    if _rotates(settings):
        detector, config, original = *only_layers(detector, config), only_layers(detector, original)[1]
    source = checked(run, detector, TRAIN)
    split = split_data(run, source)
    space = detector_space(detector, config.model, input_size(run), outside=settings.on == "detector")
    _check_width(space, settings)
    space = whole(space) if settings.on == "detector" else space
    detector.to(resolve_device(settings.device))
    config = with_data(config, TRAIN, split["rest"])
    images, slicer = images_of(config, settings), partial(slice_model, detector)
    if settings.repair:
        read = partial(images, batch_size(config))
        base, moments = aligned_detector(detector, space, read, run.folder / "base", _made_of(run))
        detector, slicer, space = base, partial(compensate, base, moments=moments), moments.space
    scores = _scores(run, detector, config, space, images, say)
    forward = predict if settings.on == "detector" else run_backbone
    budget, layers = settings.budget.value(), run.folder / "latency" / settings.on
    latencies = latencies_for(layers, detector, scores, budget, _rules(settings), say, forward=forward)
    held = len(read_json(split["holdout"])["images"])
    return Question(
        detector,
        original,
        source,
        space,
        scores,
        latencies,
        images,
        slicer,
        objective(config, settings, source, split["holdout"], None),
        f"{named(settings)} on {held} held-out training images",
        partial(objective, config, settings, source, split["fresh"], min(_FOLDS, held)),
    )


def answer(run: DetectionRun, asked: Question, worker: int = 0) -> SearchResult:
    """Search, or go on with what is there of the study.

    Args:
        run: the run.
        asked: what its search is asked.
        worker: which of several processes this is; the first shows the progress.
    """
    settings = run.settings
    assert settings.budget is not None
    return optuna_search(
        asked.detector,
        asked.scores,
        settings.budget.value(),
        asked.judge,
        trials=settings.trials,
        timeout=settings.timeout,
        seed=seed_of(worker, settings.seed),
        rules=_rules(settings),
        latencies=asked.latencies,
        slicer=asked.slicer,
        storage=settings.storage or f"sqlite:///{(run.folder / 'study.db').resolve()}",
        label=f"{asked.judged_by}, seed {settings.seed}, repair {settings.repair}, "
        f"budget of the {settings.on} at {asked.space.trace.input_size}",
        progress=not worker,
    )


def help_to_answer(run: DetectionRun, worker: int, wait: Callable[[], object]) -> None:
    """What one more process does for a run's search; see :func:`sidt.runs.workers.helped`."""
    use_spaces(*run.settings.spaces)
    asked = question_of(run, lambda text: None)
    wait()
    answer(run, asked, worker)


def _rules(settings: Settings) -> Rules:
    return Rules(settings.searched, settings.freeze, settings.min_units, settings.round_to)


def _rotates(settings: Settings) -> bool:
    """Whether the width may be cut by its directions, for a layer more in a neck that is not counted."""
    timed = settings.budget is not None and settings.budget.latency is not None
    wanted = "width" in (KINDS if settings.searched is None else settings.searched)
    return settings.repair and settings.on == "backbone" and wanted and not timed


def _check_width(space: DimensionSpace, settings: Settings) -> None:
    widths = [d for d in space.dimensions.values() if d.kind == "width"]
    if "width" in (settings.kinds or ()) and widths and all(d.fixed for d in widths):
        raise InputError("the width cannot be searched: the neck does not say how it reads the maps (in_channels)")


def _made_of(run: DetectionRun) -> dict[str, Any]:
    """What scores and moments depend on, whichever score it is."""
    weights = weights_digest(run.folder / "dense" / WEIGHTS)
    made_of = {"images": run.settings.score_images, "seed": run.settings.seed, "detector": weights}
    return made_of | ({"on": "detector"} if run.settings.on == "detector" else {})


def _scores(
    run: DetectionRun, detector: nn.Module, config: Config, space: DimensionSpace, images: Batches, say: Say
) -> Importance:
    """The scores, measured once for the same detector and settings: a search that goes on needs the very same."""
    settings, path, note = run.settings, run.folder / "scores.safetensors", run.folder / "scores.json"
    made_of = _made_of(run) | {"score": settings.score, "repair": settings.repair, "rotated": space.rotated()}
    if settings.score == "gates":
        made_of |= {"gates": settings.gates.model_dump(mode="json"), "kinds": list(settings.searched or ())}
    if path.is_file() and note.is_file() and read_json(note) == made_of:
        return load_importance(path, space)
    scores = measured_scores(detector, config, settings, space, images, say)
    note.unlink(missing_ok=True)  # between the two files, neither counts
    scores.save(path)
    write_json(note, made_of)
    return load_importance(path, space)
