"""State dicts: read without running code, and loaded strictly."""

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sidt.errors import InputError

# How timm's, DeiT's and MMDetection's checkpoints wrap theirs; timm's own order, the moving average before the rest.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What wrappers put into names: torch.compile, DataParallel and its kin, FSDP, activation checkpointing.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict, strictly: safetensors, or a torch file that holds tensors only (``weights_only=True``).

    Raises:
        InputError: the file is missing, damaged, holds code, or its tensors are not the model's.
    """
    fit_weights(model, read_weights(path), str(path))


def read_weights(path: str | Path, known: Sequence[Any] = ()) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a torch file (``weights_only=True``).

    Args:
        path: the file; in a torch file, a state dict, or a mapping that has it as ``state_dict_ema``, ``model_ema``,
            ``state_dict`` or ``model``: the first that is there, as timm takes them.
        known: classes and functions that a torch file may hold beside tensors.

    Raises:
        InputError: the file is missing, damaged or holds code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace, *known]):  # timm's own have their args
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is refused: it holds more than tensors; save the state dict alone, as safetensors"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read the weights {path}: {reason}; it may be missing or truncated") from None
    for _ in range(2):  # some wrap twice
        holder = next((k for k in _HOLDERS if isinstance(state, dict) and isinstance(state.get(k), dict)), None)
        state = state if holder is None else state[holder]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state dict; save model.state_dict() as safetensors")
    return state


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that was read from ``source``, strictly.

    What stands before every name, and not in the model's (``module.``, ``model.``, ``backbone.``), is left out, and so
    is what wrappers put into names.

    Raises:
        InputError: its tensors are not the model's; the message names the first.
    """
    state, prefix = _as_named_in(model, state)
    if difference := difference_of(model, state):
        if prefix:
            difference = f"without the {prefix!r} before its names, {difference}"
        elif shared := _most_begin_with(model, state):
            difference = f"{difference}, and {shared}"
        raise InputError(f"the weights {source} are not this model's: {difference}; use the model they were saved from")
    model.load_state_dict(state, strict=True)


def _as_named_in(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
    """A state dict with the names that a model has, and what was left out before all of them."""
    own = list(model.state_dict())
    if set(own) <= set(state):
        return state, ""
    bare = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in state}
    if len(set(bare.values())) < len(bare) or any(part in _WRAPPERS for key in own for part in key.split(".")):
        bare = {key: key for key in state}
    for name in own:
        for key, plain in bare.items():
            if f".{plain}".endswith(f".{name}") and all(p.startswith(plain.removesuffix(name)) for p in bare.values()):
                prefix = plain.removesuffix(name)
                left_out = key.removesuffix(name) if key.endswith(name) else ""
                return {p.removeprefix(prefix): state[k] for k, p in bare.items()}, left_out
    return state, ""


def _most_begin_with(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """In words, the prefix that some of the names have before those of the model."""
    first = next(iter(model.state_dict()), "")
    for key in state:
        if key.endswith(f".{first}"):
            prefix = key.removesuffix(first)
            count = sum(name.startswith(prefix) for name in state)
            return f"{count} of its {len(state)} names begin with {prefix!r}: save those alone, without it"
    return ""


def difference_of(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """The first tensor in which a model and a state dict differ, in words; ``None`` if none."""
    own = model.state_dict()
    for key, tensor in own.items():
        if key not in state:
            return f"{key} is missing"
        if state[key].shape != tensor.shape:
            return f"{key} has shape {list(state[key].shape)}, the model's has {list(tensor.shape)}"
    extra = sorted(set(state) - set(own))
    return f"{extra[0]} is not in the model" if extra else None
