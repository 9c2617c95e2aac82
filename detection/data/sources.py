"""The data that an MMDetection config reads: where it is, and copies of the config that read other data."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from torch import nn

from sidt.errors import InputError


@dataclass(frozen=True)
class Source:
    """COCO-format data that a config reads.

    Attributes:
        annotations: the annotation file.
        images: the folder that its file names are relative to.
        classes: the classes that the detector is to know, in the order of its outputs.
        masks: whether the pipeline loads masks.
    """

    annotations: Path
    images: Path
    classes: tuple[str, ...]
    masks: bool


def dataset_of(config: Config, loader: str) -> ConfigDict:
    """The data set inside ``train_dataloader``, ``val_dataloader`` or ``test_dataloader``, out of its wrappers.

    Raises:
        InputError: there is none, or it is not one data set in COCO format.
    """
    if not isinstance(config.get(loader), Mapping) or "dataset" not in config[loader]:
        raise InputError(f"the config {config.filename} has no {loader} with a dataset")
    dataset = config[loader].dataset
    while isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset.dataset
    kind = DATASETS.get(dataset.type) if isinstance(dataset.get("type"), str) else dataset.get("type")
    if not (isinstance(kind, type) and issubclass(kind, CocoDataset)) or "ann_file" not in dataset:
        raise InputError(
            f"the {loader} of {config.filename} reads a {dataset.get('type')}; SiDT needs one CocoDataset with an "
            f"ann_file (merge several into one annotation file)"
        )
    return dataset


def source_of(config: Config, loader: str) -> Source:
    """Where the data of a loader is; see :func:`dataset_of`."""
    dataset = dataset_of(config, loader)
    root = dataset.get("data_root") or ""
    kind = DATASETS.get(dataset.type) if isinstance(dataset.type, str) else dataset.type
    classes = (dataset.get("metainfo") or {}).get("classes") or kind.METAINFO["classes"]
    prefix = (dataset.get("data_prefix") or {}).get("img", "")
    pipeline = dataset.get("pipeline") or ()
    return Source(
        Path(os.path.join(root, dataset.ann_file)),
        Path(os.path.join(root, prefix)),
        tuple(classes),
        any(step.get("with_mask", False) for step in pipeline),
    )


def check_classes(detector: nn.Module, classes: tuple[str, ...], config: Config) -> None:
    """Check that a detector has as many classes as its data.

    Raises:
        InputError: it has another number.
    """
    for name, module in detector.named_modules():
        count = getattr(module, "num_classes", None)
        if (
            name.endswith(("bbox_head", "bbox_head.0", "mask_head"))
            and isinstance(count, int)
            and count != len(classes)
        ):
            raise InputError(
                f"the {name} of {config.filename} has num_classes={count}, but its data has {len(classes)} classes "
                f"({', '.join(classes[:3])}, ...); set num_classes={len(classes)}, or metainfo=dict(classes=...)"
            )


def with_data(config: Config, loader: str, annotations: Path, images: Path | None = None) -> Config:
    """A copy of a config whose loader, and its evaluator, read another annotation file (and other images)."""
    own = Config(config.to_dict(), filename=config.filename)
    dataset = dataset_of(own, loader)
    dataset.ann_file = str(annotations.resolve())
    if images is not None:
        dataset.data_prefix = {**(dataset.get("data_prefix") or {}), "img": str(images.resolve())}
    for evaluator in _evaluators(own, loader.replace("dataloader", "evaluator")):
        evaluator.ann_file = dataset.ann_file
    return own


def _evaluators(config: Config, name: str) -> list[ConfigDict]:
    """The evaluators of a config that have an annotation file."""
    found = config.get(name) or []
    return [e for e in (found if isinstance(found, list | tuple) else [found]) if e.get("ann_file")]


def move_data(config: Config, root: Path) -> None:
    """Let all loaders and evaluators of a config read below another folder than its ``data_root``."""
    new, old = f"{root}/", None
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(loader) is not None:
            dataset = dataset_of(config, loader)
            old = dataset.get("data_root") or old
            dataset.data_root = new
    for evaluator in [*_evaluators(config, "val_evaluator"), *_evaluators(config, "test_evaluator")]:
        if old:
            evaluator.ann_file = new + os.path.relpath(evaluator.ann_file, old)
