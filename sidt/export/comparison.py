"""Whether two models compute the same: what their modules are and hold, and what they make of one random image."""

from functools import partial
from typing import Any

import torch
from torch import nn

from sidt.space.outputs import tensors_of
from sidt.space.trace import input_size_of

_UNUSED = ("training", "init", "grad_checkpointing", "fused", "inplace", "drop", "target_")  # parts of such names
# target_ is what a Swin V2 would take at another size, which timm leaves behind when it changes the size.
_CLOSE = 1e-4  # of the largest output; the same operations on the same weights differ by rounding at most


def difference_between(model: nn.Module, other: nn.Module) -> str | None:
    """The first difference, in words, of two models in eval mode that hold the same weights; ``None`` if none.

    Sizes, scales, epsilons, windows and the like are compared one by one, since on one image some do not show. Drop
    rates are not. Then both see one seeded image of the size that the model was built for. Neither is changed.

    Args:
        model: the one to be told of.
        other: what should compute the same.
    """
    mine, theirs = dict(model.named_modules()), dict(other.named_modules())
    for name in [*mine, *theirs]:
        label = name or "the model"
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None:
            if not all(_idle(module) for module in (a, b) if module is not None):
                return f"{label} is {_named(type(a or b))} in {'one' if a else 'the rebuilt one'} alone"
        elif not (_idle(a) and _idle(b)):
            if not (isinstance(a, type(b)) or isinstance(b, type(a))):
                return f"{label} is {_named(type(a))}, and {_named(type(b))} when it is rebuilt"
            if found := _attribute(a, b):
                attribute, seen, rebuilt = found
                return f"{f'{name}.' if name else ''}{attribute} is {seen}, and {rebuilt} when it is rebuilt"
    return difference_of_outputs(model, other)


def difference_of_outputs(model: nn.Module, other: nn.Module) -> str | None:
    """How what two models make of one random image differs, in words; ``None`` if it does not."""
    outputs, again = ([t.float() for t in tensors_of(_answer(m, other))] for m in (model, other))
    if [t.shape for t in outputs] != [t.shape for t in again]:
        return "its output has another shape when it is rebuilt"
    for x, y in zip(outputs, again, strict=True):
        if not torch.allclose(x, y, rtol=0, atol=_CLOSE * float(x.abs().max()), equal_nan=True):
            return f"its output for one random image differs by up to {float((x - y).abs().max()):.2g} when rebuilt"
    return None


def _idle(module: nn.Module) -> bool:
    """Whether a module does nothing in eval mode."""
    kind = type(module).__name__
    return isinstance(module, nn.Identity) or kind.startswith("Drop") or kind.startswith("PatchDropout")


def _named(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)


def _attribute(a: nn.Module, b: nn.Module) -> tuple[str, str, str] | None:
    """The first attribute that both modules have as a number, text, function or several of them, and not the same."""
    for name, value in vars(a).items():
        if name.startswith("_") or name not in vars(b) or any(part in name for part in _UNUSED):
            continue
        other = vars(b)[name]
        try:
            pair = _plain(value), _plain(other)
        except TypeError:
            continue
        if pair[0] != pair[1]:
            return name, _named(value), _named(other)
    return None


def _plain(value: Any) -> Any:
    """A value that can be compared.

    Raises:
        TypeError: it is a tensor, a module, a mapping or another object.
    """
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, partial):
        return _plain(value.func), _plain(value.args), tuple((k, _plain(v)) for k, v in sorted(value.keywords.items()))
    if value is None or isinstance(value, (bool, int, float, str, type)):
        return value
    if callable(value) and hasattr(value, "__qualname__") and not isinstance(value, nn.Module):
        return value.__module__, value.__qualname__
    raise TypeError(type(value).__name__)


def _answer(model: nn.Module, like: nn.Module) -> Any:
    """What a model makes of a seeded image in eval mode; every module is left in the mode that it was in."""
    weight = next(p for p in like.parameters() if p.is_floating_point())
    image = torch.randn(1, *input_size_of(like), generator=torch.Generator().manual_seed(0)).to(weight)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return model(image)
    finally:
        for module, mode in modes:
            module.training = mode
