"""SiDT: make vision transformers smaller by searching their dimensions.

The public names are loaded on first use, so that ``import sidt`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidt import importance
    from sidt.allocation.greedy import allocate
    from sidt.allocation.study import search
    from sidt.allocation.timing import measure_layers
    from sidt.cost.budget import Budget
    from sidt.cost.complexity import measure
    from sidt.export.checkpoint import load, save
    from sidt.importance.gates import gated, learn_gates
    from sidt.space.plan import DimensionPlan, load_plan
    from sidt.space.space import space_for
    from sidt.surgery.alignment import align
    from sidt.surgery.compensation import compensate
    from sidt.surgery.moments import measure_moments
    from sidt.surgery.slicing import slice_model
    from sidt.training.distillation import distillation_loss
    from sidt.training.loop import finetune

__all__ = [
    "Budget",
    "DimensionPlan",
    "align",
    "allocate",
    "compensate",
    "distillation_loss",
    "finetune",
    "gated",
    "importance",
    "learn_gates",
    "load",
    "load_plan",
    "measure",
    "measure_layers",
    "measure_moments",
    "save",
    "search",
    "slice_model",
    "space_for",
]

_HOMES = {
    "Budget": "sidt.cost.budget",
    "DimensionPlan": "sidt.space.plan",
    "align": "sidt.surgery.alignment",
    "allocate": "sidt.allocation.greedy",
    "compensate": "sidt.surgery.compensation",
    "distillation_loss": "sidt.training.distillation",
    "finetune": "sidt.training.loop",
    "gated": "sidt.importance.gates",
    "learn_gates": "sidt.importance.gates",
    "load": "sidt.export.checkpoint",
    "load_plan": "sidt.space.plan",
    "measure": "sidt.cost.complexity",
    "measure_moments": "sidt.surgery.moments",
    "measure_layers": "sidt.allocation.timing",
    "save": "sidt.export.checkpoint",
    "search": "sidt.allocation.study",
    "slice_model": "sidt.surgery.slicing",
    "space_for": "sidt.space.space",
}


def __getattr__(name: str) -> Any:
    if name == "importance":
        return import_module("sidt.importance")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sidt' has no attribute {name!r}")
