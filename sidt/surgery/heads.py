"""Heads of timm's models: a missing one, which a rotated width needs, and one of some of the classes."""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from sidt.errors import InputError
from sidt.space.space import DimensionSpace, space_for
from sidt.space.streams import Stream

Model = TypeVar("Model", bound=nn.Module)


def with_head(model: Model, space: DimensionSpace) -> tuple[Model, DimensionSpace]:
    """A timm model without a head, as one with a linear head of as many outputs as it has features: the identity.

    It gives the same features, and is the model that ``timm.create_model`` builds with so many classes.

    Args:
        model: any model; it is not changed.
        space: its space.

    Returns:
        The model and its space; both as they are if it has a head, or if a head would let no width be rotated.
    """
    given: Any = model
    if getattr(model, "num_classes", None) != 0 or not hasattr(model, "reset_classifier"):
        return model, space
    if not getattr(model, "global_pool", "") and hasattr(given.head, "global_pool"):
        return model, space  # timm builds no head for features that such a one has not pooled
    headed = copy.deepcopy(given)
    headed.reset_classifier(given.num_features)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in headed.named_parameters():
            if name not in own:
                (nn.init.eye_ if parameter.ndim == 2 else nn.init.zeros_)(parameter)
    try:
        larger = space_for(headed, space.trace.input_size)
    except InputError:  # a head that does not take its features, as those of two poolings
        return model, space
    gained = any(
        isinstance(stream, Stream) > isinstance(space.streams[w], Stream) for w, stream in larger.streams.items()
    )
    return (headed, larger) if gained else (model, space)


def with_classes(model: Model, rows: Sequence[int]) -> Model:
    """A timm classifier of some of its classes: its head, or heads, keep these rows. The given model is not changed.

    Args:
        model: a classifier from ``timm.create_model``.
        rows: which classes stay, in the order of the new ones.

    Raises:
        InputError: the model has no such classes, or is none of timm's.
    """
    given: Any = model
    count = getattr(model, "num_classes", None)
    if not count or not hasattr(model, "reset_classifier"):
        raise InputError(f"this {type(model).__name__} has no classes to choose from; give one of timm's classifiers")
    if not rows or min(rows) < 0 or max(rows) >= count:
        raise InputError(f"the model has {count} classes, 0 to {count - 1}, and {list(rows)} are asked for")
    chosen: Any = copy.deepcopy(given)
    chosen.reset_classifier(len(rows))
    own, index = dict(given.named_parameters()), torch.tensor(list(rows))
    with torch.no_grad():
        for name, parameter in chosen.named_parameters():
            before = own[name]
            parameter.copy_(before if before.shape == parameter.shape else before[index.to(before.device)])
    chosen.train(given.training)
    result: Model = chosen
    return result
