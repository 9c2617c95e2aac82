"""SiDT: make vision transformers smaller by searching their dimensions.

The public names are loaded on first use, so that ``import sidt`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidt import importance
    from sidt.alignment import align
    from sidt.allocation import allocate
    from sidt.budget import Budget
    from sidt.checkpoint import load, save
    from sidt.compensation import compensate
    from sidt.complexity import measure
    from sidt.distillation import distillation_loss
    from sidt.gates import gated, learn_gates
    from sidt.moments import measure_moments
    from sidt.plan import DimensionPlan, load_plan
    from sidt.space import space_for
    from sidt.study import search
    from sidt.surgery import slice_model
    from sidt.timing import measure_layers
    from sidt.training import finetune

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
    "Budget": "sidt.budget",
    "DimensionPlan": "sidt.plan",
    "align": "sidt.alignment",
    "allocate": "sidt.allocation",
    "compensate": "sidt.compensation",
    "distillation_loss": "sidt.distillation",
    "finetune": "sidt.training",
    "gated": "sidt.gates",
    "learn_gates": "sidt.gates",
    "load": "sidt.checkpoint",
    "load_plan": "sidt.plan",
    "measure": "sidt.complexity",
    "measure_moments": "sidt.moments",
    "measure_layers": "sidt.timing",
    "save": "sidt.checkpoint",
    "search": "sidt.study",
    "slice_model": "sidt.surgery",
    "space_for": "sidt.space",
}


def __getattr__(name: str) -> Any:
    if name == "importance":
        return import_module("sidt.importance")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sidt' has no attribute {name!r}")
