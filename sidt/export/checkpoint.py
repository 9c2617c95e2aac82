"""Checkpoints: a folder of ``config.json``, ``plan.json`` and ``model.safetensors``. No pickle, no class of ours.

``config.json`` names the dense model for ``timm.create_model``; the plan says which of its units are left.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.files import dump_json, read_json, replacing
from sidt.space.plan import DimensionPlan, load_plan
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model

_FORMAT = "sidt-checkpoint-1"


def create_model(name: str, args: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """``timm.create_model`` with one-line errors.

    Raises:
        InputError: timm has no such model, or it does not take the arguments.
    """
    if not timm.is_model(name.removeprefix("timm/")) and ":" not in name:
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise InputError(
            f"timm has no model {name!r}; near it: {', '.join(near) or 'nothing'}; timm.list_models() has all"
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except (TypeError, AssertionError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"timm cannot build {name!r} with {dict(args)}: {reason}") from None


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
    args = dict(args) if args is not None else _own_args(model)
    plan: DimensionPlan | None = getattr(model, "sidt_plan", None)
    state = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    dense = create_model(name, args)
    rebuilt = dense
    if plan is None:
        plan = DimensionPlan(space_for(dense), {})
    elif space_for(dense).sizes == plan.space.sizes:
        rebuilt = slice_model(dense, plan)
    if difference := _difference(rebuilt, state):
        raise InputError(
            f"timm.create_model({name!r}, **{args}) does not rebuild this model: {difference}; pass the keyword "
            f"arguments that it was created with as args="
        )
    config = {"format": _FORMAT, "model": name, "args": args}
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
    plan = load_plan(folder / "plan.json", space_for(model))
    if plan.sizes != plan.space.sizes:
        model = slice_model(model, plan)
    load_weights(model, folder / "model.safetensors")
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict, strictly: safetensors, or a torch file that holds tensors only (``weights_only=True``).

    Raises:
        InputError: the file is missing, damaged, holds code, or its tensors are not the model's.
    """
    fit_weights(model, read_weights(path), str(path))


def read_weights(path: str | Path, known: Sequence[Any] = ()) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a torch file (``weights_only=True``).

    Args:
        path: the file; in a torch file, a state dict, or a mapping that has it as ``state_dict`` or ``model``.
        known: classes and functions that a torch file may hold beside tensors.

    Raises:
        InputError: the file is missing, damaged or holds code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(list(known)):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is refused: it holds more than tensors; save the state dict alone, as safetensors"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read the weights {path}: {reason}; it may be missing or truncated") from None
    for key in ("state_dict", "model"):  # how timm's, DeiT's and MMDetection's checkpoints wrap theirs
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state dict; save model.state_dict() as safetensors")
    return state


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that was read from ``source``, strictly.

    Raises:
        InputError: its tensors are not the model's; the message names the first.
    """
    if difference := _difference(model, state):
        raise InputError(f"the weights {source} are not this model's: {difference}; use the model they were saved from")
    model.load_state_dict(state, strict=True)


def _difference(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """The first tensor in which a model and a state dict differ, in words; ``None`` if none."""
    own = model.state_dict()
    for key, tensor in own.items():
        if key not in state:
            return f"{key} is missing"
        if state[key].shape != tensor.shape:
            return f"{key} has shape {list(state[key].shape)}, the model's has {list(tensor.shape)}"
    extra = sorted(set(state) - set(own))
    return f"{extra[0]} is not in the model" if extra else None


def _own_args(model: nn.Module) -> dict[str, Any]:
    """The arguments that timm models repeat as attributes, where they differ from the model's defaults."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    args: dict[str, Any] = {}
    if getattr(model, "num_classes", None) not in (None, cfg.get("num_classes")):
        args["num_classes"] = model.num_classes
    if getattr(model, "in_chans", 3) != 3:
        args["in_chans"] = model.in_chans
    img_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if img_size is not None and tuple(img_size) != tuple(cfg.get("input_size", ()))[1:]:
        args["img_size"] = list(img_size)
    return args
