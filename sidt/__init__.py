"""SiDT: make vision transformers smaller by searching their dimensions.

The public names are loaded on first use, so that ``import sidt`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidt import importance
    from sidt.allocation import allocate
    from sidt.budget import Budget
    from sidt.checkpoint import load, save
    from sidt.complexity import measure
    from sidt.plan import DimensionPlan, load_plan
    from sidt.space import space_for
    from sidt.study import search
    from sidt.surgery import slice_model
    from sidt.training import finetune

__all__ = [
    "Budget",
    "DimensionPlan",
    "allocate",
    "finetune",
    "importance",
    "load",
    "load_plan",
    "measure",
    "save",
    "search",
    "slice_model",
    "space_for",
]

_HOMES = {
    "Budget": "sidt.budget",
    "DimensionPlan": "sidt.plan",
    "allocate": "sidt.allocation",
    "finetune": "sidt.training",
    "load": "sidt.checkpoint",
    "load_plan": "sidt.plan",
    "measure": "sidt.complexity",
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
