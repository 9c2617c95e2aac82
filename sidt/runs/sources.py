"""The costs of anything that names a model: a timm model, a run folder, a checkpoint folder or a config."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sidt.allocation.paying import compare_layers
from sidt.cost.clock import whereabouts
from sidt.cost.complexity import ComplexityReport, Group, report
from sidt.data.preparation import preparation_of
from sidt.errors import InputError
from sidt.export.checkpoint import load, shapes_of
from sidt.export.models import create_model
from sidt.report.tables import Format
from sidt.report.text import latency_text
from sidt.space.plan import load_plan
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import InputSize
from sidt.surgery.heads import with_head

_SHAPES = "meta"  # the device of models of which nothing but shapes is read: no weight is initialised


def complexity_of(
    source: str, plan: Path | None, input_size: InputSize | None, by: Group
) -> tuple[ComplexityReport, ComplexityReport | None]:
    """The complexity of a timm model, a run folder, a checkpoint folder or a config, dense and sliced by a plan.

    A timm model is built for the input size. That of a folder or a config is built already, and takes it or not.

    Raises:
        InputError: the source names no model, it does not take the input size, or the plan is for another one.
    """
    model, plan, input_size = _named(source, plan, input_size, _SHAPES)
    space = space_for(model, input_size)
    dense = report(space, by=by)
    return dense, None if plan is None else report(space, load_plan(plan, space).sizes, by)


def latency_of(source: str, plan: Path | None, input_size: InputSize | None, style: Format) -> str:
    """What a plan does to the time of each layer here, as a table; sources are those of :func:`complexity_of`.

    Raises:
        InputError: the source names no model, there is no plan, or it is for another model.
    """
    model, plan, input_size = _named(source, plan, input_size, "cpu")
    if plan is None:
        raise InputError(f"the latency of {source} is compared with that of its plan; give one with --plan")
    space = space_for(model, input_size)
    rows = compare_layers(model, load_plan(plan, space))
    return latency_text(rows, whereabouts(model, space, 1), style)


def space_of(source: str, input_size: InputSize | None = None) -> DimensionSpace:
    """The space of a model; whether its widths can be rotated is said of what :func:`sidt.align` makes of it.

    Raises:
        InputError: the source names no model, it does not take the input size, or it has no space.
    """
    model, _, input_size = _named(source, None, input_size, _SHAPES)
    with torch.device(_SHAPES):
        space = space_for(model, input_size)
        return replace(space, streams=with_head(model, space)[1].streams)


def _named(
    source: str, plan: Path | None, input_size: InputSize | None, device: str
) -> tuple[nn.Module, Path | None, InputSize | None]:
    """The model that a source names, its plan if it has one and none is given, and the size that its images have."""
    path = Path(source)
    if not path.exists():
        with torch.device(device):
            return create_model(source, {}, input_size=input_size), plan, input_size
    # Here: the config of a run knows training and the search, which the costs of a model do not wait for.
    from sidt.runs.config import read_config
    from sidt.runs.folder import PLAN
    from sidt.runs.models import dense_shapes

    read = load if device != _SHAPES else shapes_of
    if path.is_dir() and not (path / "config.yaml").is_file():
        if not (path / "config.json").is_file():
            raise InputError(f"{source} is no run folder and no checkpoint: it has neither config.yaml nor config.json")
        return read(path), plan, input_size
    config = read_config(path / "config.yaml" if path.is_dir() else path)
    dense = path / "dense"
    model = read(dense) if (dense / "config.json").is_file() else dense_shapes(config.model, device)
    says = config.data
    size = input_size or (
        None if says.image_size is None and says.name == "folder" else (3, *preparation_of(says).size)
    )
    return model, plan or (path / PLAN if (path / PLAN).is_file() else None), size
