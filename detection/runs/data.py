"""The data of a detection run: checked before a step begins, and split once."""

from pathlib import Path

from mmengine.dist import barrier, is_main_process
from torch import nn

from sidt.detection.data.annotations import check_annotations, write_subsets
from sidt.detection.data.sources import Source, check_classes, source_of
from sidt.detection.runs.folder import DetectionRun
from sidt.errors import InputError
from sidt.files import read_json, write_json

TRAIN, TEST = "train_dataloader", "test_dataloader"


def check_source(source: Source) -> None:
    """Look at all annotations of a source; :func:`check_annotations` says what is wrong."""
    check_annotations(source.annotations, source.images, source.classes, masks=source.masks)


def checked(run: DetectionRun, detector: nn.Module, loader: str) -> Source:
    """Where a loader's data is, after a look at all of its annotations."""
    source = source_of(run.config, loader)
    check_classes(detector, source.classes, run.config)
    check_source(source)
    return source


def split_data(run: DetectionRun, source: Source) -> dict[str, Path]:
    """The annotations of the held-out images, of the fresh ones and of the rest: written once for a run."""
    folder, annotations = run.folder / "data", str(source.annotations.resolve())
    held, seed, classes = run.settings.holdout, run.settings.seed, list(source.classes)
    made_of = {"held": held, "seed": seed, "annotations": annotations, "classes": classes}
    if is_main_process():
        if not (folder / "split.json").is_file():
            write_subsets(source.annotations, folder, held=held, seed=seed, classes=classes)
            write_json(folder / "split.json", made_of)
        seen = {"classes": classes} | read_json(folder / "split.json")  # earlier versions did not look at the classes
        if seen != made_of:
            raise InputError(f"{folder} was split by {seen}, now {made_of} is asked for; use another run folder")
    barrier()
    return {name: folder / f"{name}.json" for name in ("rest", "holdout", "fresh")}
