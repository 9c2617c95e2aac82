"""State dicts: read without running code, and loaded strictly."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sidt.errors import InputError


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
    if difference := difference_of(model, state):
        raise InputError(f"the weights {source} are not this model's: {difference}; use the model they were saved from")
    model.load_state_dict(state, strict=True)


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
