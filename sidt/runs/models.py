"""The dense model that a config names: timm's by name, or what a folder holds."""

from pathlib import Path

import torch
from torch import nn

from sidt.data.preparation import preparation_of, prepared_for
from sidt.errors import InputError
from sidt.export.checkpoint import load, shapes_of
from sidt.export.models import create_model
from sidt.export.weights import load_weights
from sidt.runs.config import ModelConfig, RunConfig
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import input_size_of


def folder_of(name: str) -> Path | None:
    """The checkpoint folder that a model's name stands for: of a run folder, that of its dense model.

    Raises:
        InputError: there is such a folder, and it holds no model.
    """
    path = Path(name)
    if not path.is_dir():
        return None
    found = path / "dense" if (path / "config.yaml").is_file() else path
    if not (found / "config.json").is_file():
        raise InputError(f"{name} is no checkpoint and no run with a dense model: there is no {found / 'config.json'}")
    return found


def build(config: ModelConfig) -> nn.Module:
    """The model of a config, with its weights, if it comes with any.

    Raises:
        InputError: it cannot be built, or the weights are not its own.
    """
    folder = folder_of(config.name)
    if folder is None:
        model = create_model(config.name, config.args, pretrained=config.pretrained)
    else:
        if config.args:
            raise InputError(f"the model is that of {folder}, which takes no arguments; leave out {config.args}")
        model = load(folder)
    if config.checkpoint is not None:
        load_weights(model, config.checkpoint)
    return model


def dense_shapes(config: ModelConfig, device: str = "meta") -> nn.Module:
    """The model of a config without its weights: on the meta device, of shapes alone."""
    folder = folder_of(config.name)
    if folder is not None:
        return shapes_of(folder) if device == "meta" else load(folder)
    with torch.device(device):
        return create_model(config.name, config.args)


def has_weights(config: ModelConfig) -> bool:
    """Whether the model of a config comes with weights."""
    return config.pretrained or config.checkpoint is not None or folder_of(config.name) is not None


def prepared(config: RunConfig) -> RunConfig:
    """The config with all that is said about how images are prepared: by the config, else the model or the data set."""
    folder, cfg = folder_of(config.model.name), None
    published = config.model.pretrained or folder is not None
    if published or config.data.name == "folder":
        model = dense_shapes(config.model)
        own = getattr(model, "pretrained_cfg", None) or {}
        cfg = {**own, "input_size": input_size_of(model)}
    return config.model_copy(update={"data": prepared_for(config.data, cfg, published=published)})


def original_space(model: nn.Module, space: DimensionSpace) -> DimensionSpace:
    """What plans on disk are of: the space of a model, or of the one that it was sliced from."""
    plan: DimensionPlan | None = getattr(model, "sidt_plan", None)
    return space if plan is None else plan.space


def space_of(config: RunConfig, model: nn.Module) -> DimensionSpace:
    """The space of a model of a run, with the costs of an image of the run.

    Raises:
        InputError: the model has no space, or does not take images of that size.
    """
    return space_for(model, (3, *preparation_of(config.data).size))
