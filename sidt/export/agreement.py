"""Whether an exported model computes what the model does: on random images, relative to the scale of each output."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.space.outputs import tensors_of
from sidt.space.trace import InputSize, input_size_of

Run = Callable[[Tensor], Sequence[Tensor]]  # a batch of images -> the outputs


@dataclass(frozen=True)
class Exported:
    """A model as its file holds it.

    Attributes:
        data: the bytes of the file.
        run: runs them on a batch of images.
        error: the largest difference from the model's outputs, relative to the largest entry of each output.
        agreement: for a classifier, on how many of the images its first choice is the model's; else ``None``.
        images: how many random images both were compared on.
    """

    data: bytes
    run: Run
    error: float
    agreement: int | None
    images: int


def ready(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32 and eval mode, that asks for no gradient."""
    twin = copy.deepcopy(model).cpu().float().requires_grad_(False)
    twin.eval()  # nothing comes back from MMDetection's Swin
    return twin


def example(model: nn.Module, input_size: InputSize | None, *, dynamic_batch: bool) -> Tensor:
    """The images that the exporter traces: one, or two where a batch may have any size (one would stay one).

    Raises:
        InputError: the model does not take images of that size.
    """
    size = input_size or input_size_of(model)
    images = torch.randn(2 if dynamic_batch else 1, *size, generator=torch.Generator().manual_seed(0))
    try:
        outputs_of(model, images)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{type(model).__name__} does not take an input of {'x'.join(map(str, size))}: {reason}"
        ) from None
    return images


def outputs_of(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """What a model gives, as a tuple."""
    with torch.no_grad():
        return tuple(tensors_of(model(images)))


def compared(model: nn.Module, data: bytes, run: Run, images: Tensor, *, dynamic_batch: bool) -> Exported:
    """Compare an exported model with the model that it was made of.

    Args:
        model: as :func:`ready` gives it.
        data: the bytes of the exported model.
        run: runs them.
        images: an example, for its size.
        dynamic_batch: whether batches of one, two and five images are tried, and not eight times one.

    Raises:
        InputError: the exported model does not run on such batches.
    """
    generator = torch.Generator().manual_seed(1)
    errors, same, total = [0.0], 0, 0
    for count in (1, 2, 5) if dynamic_batch else (1,) * 8:
        batch = torch.randn(count, *images.shape[1:], generator=generator)
        expected = outputs_of(model, batch)
        try:
            seen = run(batch)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the exported {type(model).__name__} does not run on a batch of {count}, so nothing is written: "
                f"{reason}" + ("; export it without a dynamic batch" if dynamic_batch else "")
            ) from None
        errors += [_error(ours, theirs) for ours, theirs in zip(expected, seen, strict=True)]
        same += int((expected[0].argmax(-1) == seen[0].argmax(-1)).sum()) if expected[0].ndim == 2 else 0
        total += count
    classifies = len(expected) == 1 and expected[0].ndim == 2
    return Exported(data, run, max(errors), same if classifies else None, total)


def _error(expected: Tensor, seen: Tensor) -> float:
    """Infinite where shapes differ or an entry is no number."""
    if expected.shape != seen.shape:
        return math.inf
    error = float((expected - seen).abs().max() / expected.abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


def refuse_beyond(exported: Exported, bound: float, what: str) -> None:
    """Refuse an exported model whose outputs are not the model's.

    Raises:
        InputError: the error is above the bound.
    """
    if exported.error > bound:
        raise InputError(
            f"the outputs of the {what} differ from the model's by {said(exported)}; the bound is {bound:g}, so "
            f"nothing is written"
        )


def said(exported: Exported) -> str:
    """The error and the agreement, in words."""
    error = f"{exported.error:.1e} of the output's scale"
    if exported.agreement is None:
        return error
    return f"{error} (the first choice is the same for {exported.agreement} of {exported.images} random images)"
