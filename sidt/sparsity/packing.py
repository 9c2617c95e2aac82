"""Packed weights: what a structure leaves, bit by bit, and back again bit for bit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors
from torch import Tensor

from sidt.errors import InputError
from sidt.sparsity.patterns import as_bits, from_bits
from sidt.sparsity.reordering import filter_order, order_bits
from sidt.sparsity.structures import Structure
from sidt.sparsity.values import Levels

_FORMAT, _SEPARATOR = "sidt-packed-1", "//"
_STRUCTURE = TypeAdapter(Structure)


def pack(weight: Tensor, structure: Structure) -> dict[str, Tensor]:
    """The packed form of a feasible weight.

    Args:
        weight: what the structure's projection gave, or a training that held it.
        structure: its structure.

    Returns:
        ``codes`` and ``index.0``, ... as uint8, eight bits a byte, and ``scales``; where the structure reorders filters
        ``order`` too, and the others are of the weight in that order.

    Raises:
        InputError: the weight is not feasible.
    """
    given = weight = weight.detach().float().cpu()
    kept, order = structure.stored(weight), torch.zeros(0, dtype=torch.int64)
    if structure.reorders:
        order = filter_order(kept)
        weight, kept = weight[order], kept[order]
    codes, scales = structure.values.encode(weight, kept)
    parts = {
        "codes": _bytes(as_bits(codes, structure.values.bits)),
        "scales": scales.bfloat16() if isinstance(structure.values, Levels) else scales,
    }
    parts |= {f"index.{i}": _bytes(index) for i, (_, index, _) in enumerate(structure.masks(weight))}
    if structure.reorders:
        parts["order"] = _bytes(as_bits(order, order_bits(len(order))))
    if not torch.equal(unpack(parts, structure, tuple(given.shape)), given):
        raise InputError(f"a weight of shape {list(weight.shape)} is not of its structure; project it before packing")
    return parts


def unpack(parts: Mapping[str, Tensor], structure: Structure, shape: tuple[int, ...]) -> Tensor:
    """The weight that :func:`pack` was given: float32 in that shape.

    Raises:
        InputError: the parts are not as long as the shape says, or one is missing.
    """
    try:
        like, kept = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
        for i, pattern in enumerate(structure.patterns):
            kept &= pattern.decode(_bits(parts[f"index.{i}"]), like)
        width = structure.values.bits
        codes = from_bits(_bits(parts["codes"])[: int(kept.sum()) * width], width)
        weight = structure.values.decode(codes, parts["scales"].float(), kept)
        return weight[_places(parts["order"], len(weight))] if structure.reorders else weight
    except (RuntimeError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"packed parts do not make a weight of shape {list(shape)}: {_line(error)}") from None


def _places(order: Tensor, filters: int) -> Tensor:
    """The place of each filter in a packed form."""
    width = order_bits(filters)
    found = from_bits(_bits(order)[: filters * width], width)
    if not torch.equal(found.sort().values, torch.arange(filters)):
        raise IndexError(f"the order of {filters} filters does not name each once")
    return found.argsort()


def packed(
    state: Mapping[str, Tensor], structures: Mapping[str, Structure], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The tensors of a model, those with a structure packed, as one safetensors file that :func:`read_packed` reads.

    Args:
        state: tensors by name.
        structures: of some of them.
        metadata: what else the file says of itself.

    Raises:
        InputError: a weight is not of its structure.
    """
    tensors: dict[str, Tensor] = {}
    says: dict[str, Any] = {}
    for name, tensor in state.items():
        if (structure := structures.get(name)) is None:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
            continue
        try:
            parts = pack(tensor, structure)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        tensors |= {f"{name}{_SEPARATOR}{part}": tensor for part, tensor in parts.items()}
        says[name] = {"shape": list(tensor.shape), "structure": _STRUCTURE.dump_python(structure, mode="json")}
    own = {"format": _FORMAT, "structures": json.dumps(says, separators=(",", ":"))}
    return dump_tensors(tensors, metadata={**(metadata or {}), **own})


def read_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, Structure]]:
    """The tensors that :func:`packed` was given, and the structures of some of them.

    Raises:
        InputError: the file is missing, damaged or no packed file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {_line(error)}; compress again, or copy the file again") from None
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path} is no packed file (format {_FORMAT!r}), but {metadata.get('format')!r}")
    structures, state = {}, {}
    try:
        for name, says in json.loads(metadata["structures"]).items():
            structures[name] = _STRUCTURE.validate_python(says["structure"])
            begin = f"{name}{_SEPARATOR}"
            parts = {key.removeprefix(begin): tensors.pop(key) for key in list(tensors) if key.startswith(begin)}
            state[name] = unpack(parts, structures[name], tuple(says["shape"]))
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ) as error:  # pydantic's, JSON's: ValueErrors
        raise InputError(f"{path} is damaged: {_line(error)}; compress again") from None
    return tensors | state, structures


def _bytes(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), bitorder="little"))


def _bits(data: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(data.numpy(), bitorder="little")).bool()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
