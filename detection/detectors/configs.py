"""MMDetection configs: reading them, what they say of their data, and the detectors they build."""

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from torch import nn

from sidt.errors import InputError
from sidt.space.trace import InputSize

_COCO_SCALE = (1333, 800)  # the usual longest and shortest side; costs are stated at 800 x 1280, as MMDetection does
_DEFAULT_SIZE = (3, 800, 1280)


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read an MMDetection config.

    Args:
        path: a ``.py`` config; MMEngine runs it, so it must be one that you trust.
        options: values that replace others, by dotted key, as MMDetection's ``--cfg-options``.

    Raises:
        InputError: it is missing, is not a config, or describes no detector.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no config {path}; give the path of an MMDetection config (.py)")
    register_all_modules(init_default_scope=False)
    try:
        config = Config.fromfile(str(path))
        config.merge_from_dict(dict(options or {}))
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise InputError(f"cannot read the config {path}: {_reason(error)}") from None
    if not isinstance(config.get("model"), Mapping) or "backbone" not in config.model:
        raise InputError(f"{path} describes no detector: it has no model with a backbone")
    init_default_scope(config.get("default_scope", "mmdet"))
    return config


def build_detector(config: Config) -> nn.Module:
    """The detector of a config, for a checkpoint to come: pretrained weights are neither downloaded nor read.

    Raises:
        InputError: MMDetection cannot build it.
    """
    init_default_scope(config.get("default_scope", "mmdet"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bare = copy.deepcopy(config.model)
            bare["backbone"] = ConfigDict(without_weights(bare.backbone))
            detector: nn.Module = MODELS.build(bare)
    except InputError:
        raise
    except Exception as error:  # constructors raise nearly anything
        cause = error.__cause__
        raise (cause if isinstance(cause, InputError) else InputError(_unbuildable(config, error))) from None
    return detector


def without_weights(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a backbone without where its weights would come from."""
    return {key: value for key, value in backbone.items() if key not in ("init_cfg", "pretrained", "checkpoint")}


def _unbuildable(config: Config, error: Exception) -> str:
    return f"MMDetection cannot build the {config.model.get('type')} of {config.filename}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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


def input_size_of(config: Config) -> InputSize:
    """The image size that costs are stated at: that of the test pipeline, 3 x 800 x 1280 for COCO's (1333, 800)."""
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    for step in dataset.get("pipeline") or ():
        scale = step.get("scale")
        if isinstance(scale, tuple | list) and len(scale) == 2 and tuple(scale) != _COCO_SCALE:
            return 3, int(scale[1]), int(scale[0])
    return _DEFAULT_SIZE


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
