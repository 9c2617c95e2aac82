"""Checkpoints: a folder of ``config.json``, ``plan.json`` and ``model.safetensors``. No pickle, no class of ours.

``config.json`` names the dense model for ``timm.create_model``; the plan says which of its units are left.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as dump_tensors
from torch import nn

from sidt.errors import InputError
from sidt.export.models import create_model, own_args
from sidt.export.weights import difference_of, load_weights
from sidt.files import dump_json, read_json, replacing
from sidt.space.plan import DimensionPlan, load_plan
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model

_FORMAT = "sidt-checkpoint-1"


def save(
    model: nn.Module, folder: str | Path, *, name: str | None = None, args: Mapping[str, Any] | None = None
) -> None:
    """Write a dense or sliced timm model to a folder, so that :func:`load` gives it back.

    The three files are written whole before the first of them replaces an older one.

    Args:
        model: a model from ``timm.create_model``, or what :func:`sidt.slice_model` made of one.
        folder: where to write; made if needed.
        name: the timm model name; default: what the model says of itself.
        args: the keyword arguments that were given to ``timm.create_model``; default: class count, channels and
            image size, as the model says.

    Raises:
        InputError: name and args do not rebuild the model, or the folder cannot be written.
    """
    name = name or (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise InputError(f"this {type(model).__name__} does not say its timm name; pass name= to save")
    args = dict(args) if args is not None else own_args(model)
    plan: DimensionPlan | None = getattr(model, "sidt_plan", None)
    state = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    dense = create_model(name, args)
    rebuilt = dense
    if plan is None:
        plan = DimensionPlan(space_for(dense), {})
    elif space_for(dense).sizes == plan.space.sizes:
        rebuilt = slice_model(dense, plan)
    if difference := difference_of(rebuilt, state):
        raise InputError(
            f"timm.create_model({name!r}, **{args}) does not rebuild this model: {difference}; pass the keyword "
            f"arguments that it was created with as args="
        )
    config: dict[str, Any] = {"format": _FORMAT, "model": name, "args": args}
    if rotated := getattr(model, "sidt_rotated", ()):
        config["rotated"] = list(rotated)  # the widths whose units stand in order
    folder = Path(folder)
    with (
        replacing(folder / "config.json") as config_file,
        replacing(folder / "plan.json") as plan_file,
        replacing(folder / "model.safetensors") as weights_file,
    ):
        config_file.write_text(dump_json(config), encoding="utf-8")
        plan_file.write_text(dump_json(plan.to_json()), encoding="utf-8")
        weights_file.write_bytes(dump_tensors(state, metadata={"format": "pt"}))


def load(folder: str | Path) -> nn.Module:
    """Read a model that :func:`save` wrote, dense or sliced, on the CPU and in eval mode.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no checkpoint: it has no config.json (with plan.json and model.safetensors)")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != _FORMAT or not isinstance(config.get("args"), dict):
        raise InputError(f"{folder / 'config.json'} is not the config of a checkpoint (format {_FORMAT!r})")
    model = create_model(str(config.get("model")), config["args"])
    if isinstance(rotated := config.get("rotated"), list):
        model.sidt_rotated = tuple(map(str, rotated))  # type: ignore[assignment]
    plan = load_plan(folder / "plan.json", space_for(model))
    if plan.sizes != plan.space.sizes:
        model = slice_model(model, plan)
    load_weights(model, folder / "model.safetensors")
    return model.eval()
