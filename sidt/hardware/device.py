"""Hardware that is not here: devices from YAML files, and what of a model's layers a model of them counts.

Cycles and crossbars that follow are **modelled, not measured**.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.settings import parse, read_yaml

Rows = tuple[tuple[int, int, int], ...]  # as in Trace.positions: first row, last row + 1, positions


class Device(BaseModel):
    """What every device file has: its numbers and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)


AnyDevice = TypeVar("AnyDevice", bound=Device)


def read_device(kind: type[AnyDevice], path: str | Path) -> AnyDevice:
    """Read a device's YAML file.

    Args:
        kind: :class:`sidt.hardware.FpgaDevice` or :class:`sidt.hardware.CrossbarDevice`.
        path: the file.

    Raises:
        InputError: it cannot be read, or a value cannot be used; the first such key is named.
    """
    return parse(kind, read_yaml(Path(path), kind, "device"), f"the device {path}")


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight of a model, as hardware sees it.

    Attributes:
        name: the weight's.
        weight: [outputs, inputs of a group, *kernel].
        groups: into how many its inputs and outputs are divided.
        steps: input positions that are new at each output position (the product of a convolution's strides).
        rows: which outputs are used at how many positions of one image.
    """

    name: str
    weight: Tensor
    groups: int
    steps: int
    rows: Rows


def layers_of(model: nn.Module, positions: Mapping[str, Rows]) -> Iterator[Layer]:
    """The linear layers and convolutions that one image goes through.

    Args:
        model: any model.
        positions: ``space.trace.positions`` of it.

    Raises:
        InputError: the positions are of another model.
    """
    own = dict(model.named_parameters())
    for name, rows in positions.items():
        if name not in own:
            raise InputError(f"the positions name {name}, which this {type(model).__name__} does not have; trace it")
        module = model.get_submodule(name.rpartition(".")[0])
        weight, groups = own[name].detach(), getattr(module, "groups", 1)
        transposed = getattr(module, "transposed", False)
        if max(last for _, last, _ in rows) > len(weight):
            raise InputError(
                f"the positions are of a {name} with more than the {len(weight)} rows it has; trace this model"
            )
        if transposed and groups > 1:
            raise InputError(f"{name} is a transposed convolution in {groups} groups, which no device model here knows")
        if transposed:  # its rows are inputs, and each of them is read once
            outputs = weight.shape[1]
            yield Layer(name, weight.transpose(0, 1), 1, 1, tuple((0, outputs, n) for _, _, n in rows))
        else:
            strides = getattr(module, "stride", ())
            yield Layer(name, weight, groups, int(torch.tensor(strides).prod()) if strides else 1, rows)


def connections(weight: Tensor, groups: int = 1) -> Tensor:
    """Which inputs each output is connected to, by a weight that is not zero: boolean [outputs, inputs, kernel].

    Args:
        weight: [outputs, inputs of a group, *kernel].
        groups: of a convolution; an output is connected to no input of another group.
    """
    parts = (weight != 0).flatten(2) if weight.ndim > 2 else (weight != 0).unsqueeze(2)
    if groups == 1:
        return parts
    outputs, inputs, size = len(parts) // groups, parts.shape[1], parts.shape[2]
    whole = parts.new_zeros(groups, outputs, groups, inputs, size)
    whole[range(groups), :, range(groups)] = parts.view(groups, outputs, inputs, size)
    return whole.view(groups * outputs, groups * inputs, size)
