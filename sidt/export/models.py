"""timm models by name and keyword arguments."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from sidt.errors import InputError


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


def own_args(model: nn.Module) -> dict[str, Any]:
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
