"""torch.export's files (.pt2): a graph that torch runs without the code of the model."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.export.agreement import Exported, compared, example, outputs_of, ready, refuse_beyond
from sidt.files import check_file, write_bytes
from sidt.space.trace import InputSize

BOUND = 1e-4  # largest difference from the model, relative to the output's scale


def to_torch(
    model: nn.Module, path: str | Path, *, input_size: InputSize | None = None, dynamic_batch: bool = False
) -> Exported:
    """Write a model, dense or sliced, as one file for ``torch.export.load``.

    Args:
        model: gives a tensor or several. It is not changed.
        path: the file, ``*.pt2``; it is written only if what is loaded from it computes what the model computes.
        input_size: channels, height, width of an image; default: what the model was built for.
        dynamic_batch: whether the file takes batches of any size; else it takes one image.

    Raises:
        InputError: the model cannot be exported, the outputs differ, or the file cannot be written.
    """
    check_file(Path(path))
    exported = as_program(model, input_size, dynamic_batch=dynamic_batch)
    refuse_beyond(exported, BOUND, "exported program")
    write_bytes(Path(path), exported.data)
    return exported


def as_program(model: nn.Module, input_size: InputSize | None, *, dynamic_batch: bool) -> Exported:
    """What :func:`to_torch` writes, whatever its outputs are."""
    model = ready(model)
    images = example(model, input_size, dynamic_batch=dynamic_batch)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(torch.export.export(model, (images,), dynamic_shapes=shapes), file)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"torch cannot export this {type(model).__name__}: {reason}") from None
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()

    def run(batch: Tensor) -> Sequence[Tensor]:
        return outputs_of(loaded, batch)

    return compared(model, file.getvalue(), run, images, dynamic_batch=dynamic_batch)
