"""MMDetection configs: reading them, and the detectors they build."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
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
        config.merge_from_dict(copy.deepcopy(dict(options or {})))  # which it changes
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


def first_neck(model: Mapping[str, Any]) -> tuple[Any, str]:
    """The config of the neck that reads a backbone's maps, ``None`` if there is none, and where it is in the detector.

    Some detectors have several necks, one after the other.
    """
    neck = model.get("neck")
    return (neck[0], "neck.0") if isinstance(neck, list | tuple) else (neck, "neck")


def readers(model: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """The configs of the modules that read a backbone's maps, and where they are in the model.

    That is the first neck. Of a segmentor without a neck, it is its decode heads and auxiliary heads.
    """
    neck, path = first_neck(model)
    if neck is not None:
        return [(neck, path)]
    found: list[tuple[Any, str]] = []
    for name in ("decode_head", "auxiliary_head"):
        head: Any = model.get(name)
        several = isinstance(head, list | tuple)
        found += [(h, f"{name}.{i}") for i, h in enumerate(head)] if several else [(head, name)] if head else []
    return found


def channels_of(reader: Mapping[str, Any]) -> Any:
    """The channels of the maps that a neck or head is built for, which follow a plan; ``None`` if no argument does.

    ViTDet's own pyramid makes all its channels of ``backbone_channel``, and cannot be built of fewer with the rest as
    it is.
    """
    return None if "backbone_channel" in reader else reader.get("in_channels")


def maps_of(reader: Mapping[str, Any], maps: Sequence[str]) -> list[str]:
    """Of the maps of a backbone, those that the channels of a neck or head are of, in their order.

    A list of channels is of all maps and a single one of the last, but where ``in_index`` picks others.
    """
    several = isinstance(channels_of(reader), list | tuple)
    index = reader.get("in_index", range(len(maps)) if several else -1)
    return [maps[i] for i in (index if several else [index])]


def without_weights(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a backbone without where its weights would come from."""
    return {key: value for key, value in backbone.items() if key not in ("init_cfg", "pretrained", "checkpoint")}


def _unbuildable(config: Config, error: Exception) -> str:
    return f"MMDetection cannot build the {config.model.get('type')} of {config.filename}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def input_size_of(config: Config) -> InputSize:
    """The image size that costs are stated at: that of the test pipeline, 3 x 800 x 1280 for COCO's (1333, 800)."""
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    for step in dataset.get("pipeline") or ():
        scale = step.get("scale")
        if isinstance(scale, tuple | list) and len(scale) == 2 and tuple(scale) != _COCO_SCALE:
            return 3, int(scale[1]), int(scale[0])
    return _DEFAULT_SIZE
