"""The costs of anything that names a model: a timm model, a run folder, a checkpoint folder or a config."""

from pathlib import Path

from torch import nn

from sidt.allocation.paying import compare_layers
from sidt.cost.clock import whereabouts
from sidt.cost.complexity import ComplexityReport, Group, report
from sidt.errors import InputError
from sidt.export.checkpoint import load
from sidt.export.models import create_model
from sidt.runs.config import read_config
from sidt.runs.folder import PLAN
from sidt.runs.report import Format, latency_text
from sidt.space.plan import load_plan
from sidt.space.space import space_for
from sidt.space.trace import InputSize


def complexity_of(
    source: str, plan: Path | None, input_size: InputSize | None, by: Group
) -> tuple[ComplexityReport, ComplexityReport | None]:
    """The complexity of a timm model, a run folder, a checkpoint folder or a config, dense and sliced by a plan.

    Raises:
        InputError: the source names no model, or the plan is for another one.
    """
    model, plan = _named(source, plan)
    space = space_for(model, input_size)
    dense = report(space, by=by)
    return dense, None if plan is None else report(space, load_plan(plan, space).sizes, by)


def latency_of(source: str, plan: Path | None, input_size: InputSize | None, style: Format) -> str:
    """What a plan does to the time of each layer here, as a table; sources are those of :func:`complexity_of`.

    Raises:
        InputError: the source names no model, there is no plan, or it is for another model.
    """
    model, plan = _named(source, plan)
    if plan is None:
        raise InputError(f"the latency of {source} is compared with that of its plan; give one with --plan")
    space = space_for(model, input_size)
    rows = compare_layers(model, load_plan(plan, space))
    return latency_text(rows, whereabouts(model, space, 1), style)


def _named(source: str, plan: Path | None) -> tuple[nn.Module, Path | None]:
    """The model that a source names, and its plan if it has one and none is given."""
    path = Path(source)
    if (path / "config.yaml").is_file():
        config = read_config(path / "config.yaml").model
        model = create_model(config.name, config.args)
        plan = plan or (path / PLAN if (path / PLAN).is_file() else None)
    elif (path / "config.json").is_file():
        model = load(path)
    elif path.is_file():
        config = read_config(path).model
        model = create_model(config.name, config.args)
    elif path.exists():
        raise InputError(f"{source} is no run folder and no checkpoint: it has neither config.yaml nor config.json")
    else:
        model = create_model(source, {})
    return model, plan
