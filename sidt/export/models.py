"""timm models by name and keyword arguments."""

import re
from collections.abc import Mapping
from typing import Any

import timm
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from timm.models import resolve_model_input_args
from torch import nn

from sidt.errors import InputError
from sidt.space.trace import InputSize

_HUB = re.compile("hf[-_]hub:", re.IGNORECASE)
# The system's errors, and those of the HTTP library that the hub's client has.
_NETWORK = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def create_model(
    name: str, args: Mapping[str, Any], *, pretrained: bool = False, input_size: InputSize | None = None
) -> nn.Module:
    """``timm.create_model`` with one-line errors.

    Args:
        name: a timm model.
        args: its keyword arguments.
        pretrained: whether timm loads its published weights.
        input_size: channels, height, width that it is built for, as far as its class is built for a size; default: its
            own.

    Raises:
        InputError: timm has no such model, it does not take the arguments, or the hub cannot be asked for it.
    """
    if not timm.is_model(name.removeprefix("timm/")) and ":" not in name:
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise InputError(
            f"timm has no model {name!r}; near it: {', '.join(near) or 'nothing'}; timm.list_models() has all"
        )
    if prefix := _HUB.match(name):
        _ask_hub(name[prefix.end() :])
    try:
        if input_size is not None:
            wanted = resolve_model_input_args(name, {"input_size": input_size}, **args)
            args = {**args, **{key: wanted[key] for key in ("in_chans", "img_size") if key in wanted}}
        return timm.create_model(name, pretrained=pretrained, **args)
    except (TypeError, AssertionError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"timm cannot build {name!r} with {dict(args)}: {reason}") from None


def _ask_hub(model: str) -> None:
    """Ask the hub once for a model that is not in its cache: timm would for half a minute, and tell of every try."""
    repository, _, revision = model.partition("@")
    try:
        if isinstance(try_to_load_from_cache(repository, "config.json", revision=revision or None), str):
            return
        there = HfApi().file_exists(repository, "config.json", revision=revision or None)
    except HFValidationError:
        raise InputError(f"hf-hub:{model} names no repository of the hub; write hf-hub:OWNER/NAME") from None
    except _NETWORK as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot ask the hub for {model}: {reason}; is there a network? A timm model by its name needs none"
        ) from None
    if not there:
        raise InputError(f"the hub has no timm model {model}, or it is private; look for it on https://huggingface.co")


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
