"""Scores: a number for every unit of every dimension, and the one reduction that all criteria make them by."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as dump_arrays
from torch import Tensor

from sidt.errors import InputError
from sidt.files import replacing
from sidt.space.axes import views
from sidt.space.space import DimensionSpace

Scores = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of all units of a space; higher is more important.

    Attributes:
        space: the space of the dense model.
        scores: for each dimension, shape [size], or [parent size, size] where units are chosen for each unit of
            a parent.

    Raises:
        InputError: a dimension is missing or has another shape, or a score is not finite.
    """

    space: DimensionSpace
    scores: Scores

    def __post_init__(self) -> None:
        """Check names, shapes and values."""
        for name, dimension in self.space.dimensions.items():
            shape = (*([self.space.dimensions[dimension.per].size] if dimension.per else []), dimension.size)
            seen = self.scores[name].shape if name in self.scores else None
            if seen != shape:
                raise InputError(
                    f"the scores of {name} have shape {seen}, this {self.space.model} needs {shape}; score it again"
                )
            if not np.isfinite(self.scores[name]).all():
                raise InputError(f"the scores of {name} are not finite; check the model's weights and the loss")

    def save(self, path: str | Path) -> None:
        """Write the scores as safetensors, in one step."""
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(dump_arrays({name: np.ascontiguousarray(s) for name, s in self.scores.items()}))


def load_importance(path: str | Path, space: DimensionSpace) -> Importance:
    """Read scores that were saved for the model that ``space`` describes.

    Raises:
        InputError: the file is missing or damaged, or the scores are for another model.
    """
    try:
        return Importance(space, load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the scores {path}: {error}; write them again with `sidt score`") from None


def unit_sums(
    space: DimensionSpace, tensors: Iterable[tuple[str, Tensor]], dim: int | None = None
) -> dict[str, Tensor]:
    """Sum contributions over all axes but a dimension's own, over every place where it lives.

    Args:
        space: the space.
        tensors: names of parameters and contributions of the parameter's shape; a generator holds one at a time.
        dim: count only the places along this tensor axis.

    Returns:
        For each dimension a float64 tensor, shape [size] or [parent size, size].
    """
    sizes, per, sums = space.sizes, space.per, {}
    for name, dimension in space.dimensions.items():
        shape = (*([sizes[dimension.per]] if dimension.per else []), dimension.size)
        sums[name] = torch.zeros(shape, dtype=torch.float64)
    for parameter, tensor in tensors:
        for position, axis in enumerate(space.places[parameter].axes):
            if dim is not None and position != dim:
                continue
            found = [
                (n, v) for n in {s for t in axis for s in t if isinstance(s, str)} for v in views(axis, sizes, n, per)
            ]
            if found:
                others = [d for d in range(tensor.ndim) if d != position]
                along = (tensor.sum(others, dtype=torch.float64) if others else tensor.double()).cpu()
            for name, (at, shape, kept) in found:
                stretch = along[list(at)].view(shape)
                rest = [d for d in range(len(shape)) if d not in kept]
                sums[name] += stretch.sum(rest) if rest else stretch
    return sums
