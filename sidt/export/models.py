"""Models by name and keyword arguments: timm's, and Hugging Face's (:mod:`sidt.export.huggingface`)."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from timm.layers.helpers import to_2tuple
from timm.models import get_model_args, get_pretrained_cfg, resolve_model_input_args
from timm.models import save_for_hf as save_as_timm
from torch import nn

from sidt.errors import InputError
from sidt.export import huggingface
from sidt.export.hub import ask_for_weights, download, one_line, repository_in
from sidt.files import read_json
from sidt.space.trace import InputSize


def create_model(
    name: str, args: Mapping[str, Any], *, pretrained: bool = False, input_size: InputSize | None = None
) -> nn.Module:
    """``timm.create_model`` with one-line errors.

    Args:
        name: a timm model; ``hf:FOLDER`` or ``hf:OWNER/NAME`` of Hugging Face.
        args: its keyword arguments.
        pretrained: whether its published weights are loaded.
        input_size: channels, height, width that it is built for, as far as its class is built for a size; default: its
            own.

    Raises:
        InputError: timm has no such model, it does not take the arguments, or the hub cannot be reached for it.
    """
    if huggingface.is_named_here(name):
        return huggingface.build(name, args, pretrained=pretrained, input_size=input_size)
    name = name.removeprefix("timm/")  # as the hub has timm's own weights
    if not timm.is_model(name) and ":" not in name:
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise InputError(
            f"timm has no model {name!r}; near it: {', '.join(near) or 'nothing'}; timm.list_models() has all"
        )
    on_hub = repository_in(name) if ":" in name and not name.startswith("local-dir:") else None
    try:
        if input_size is not None:
            wanted = resolve_model_input_args(name, {"input_size": input_size}, **args)
            args = {**args, **{key: wanted[key] for key in ("in_chans", "img_size") if key in wanted}}
        if pretrained and not on_hub and not any(key.startswith("pretrained_cfg") for key in args):
            cfg = get_pretrained_cfg(name)
            if cfg is not None and cfg.hf_hub_id:
                ask_for_weights(cfg.hf_hub_id, "timm model")
        if on_hub:
            download(*on_hub, ("config.json",), "timm model")
        with one_line(on_hub[0], "timm model") if on_hub else nullcontext():
            return _saying_its_size(timm.create_model(name, pretrained=pretrained, **args), args)
    except InputError:
        raise
    except (TypeError, AssertionError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"timm cannot build {name!r} with {dict(args)}: {reason}") from None


def _saying_its_size(model: nn.Module, args: Mapping[str, Any]) -> nn.Module:
    """A model that was built for a size which its class keeps nowhere, as Hiera's, says it as those that do."""
    if args.get("img_size") and not any(hasattr(m, "img_size") for m in (model, getattr(model, "patch_embed", None))):
        model.img_size = to_2tuple(args["img_size"])
    return model


def own_args(model: nn.Module) -> dict[str, Any]:
    """The arguments that rebuild a model, as timm keeps them, without drop rates; of Hugging Face's, the config.

    timm's are those that it was created with, and what ``reset_classifier`` and ``set_input_size`` changed since.
    """
    if huggingface.class_name_of(model) is not None:
        return huggingface.args_of(model)
    return dict(get_model_args(model))


def maker_of(name: str, args: Mapping[str, Any]) -> str:
    """What builds a model, in words."""
    if huggingface.is_named_here(name):
        return f"{name} of its config"
    return f"timm.create_model({name!r}, **{dict(args)})"


def name_of(model: nn.Module) -> str | None:
    """The timm name of a model, with the tag of its published weights where that is not the usual one.

    Of one of Hugging Face's it is its class.
    """
    if (kind := huggingface.class_name_of(model)) is not None:
        return kind
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture"), cfg.get("tag")
    if not name or not timm.is_model(name):
        return None
    try:
        usual, own = get_pretrained_cfg(name), get_pretrained_cfg(f"{name}.{tag}")
    except RuntimeError:  # a tag of somebody's own
        return str(name)
    return f"{name}.{tag}" if tag and usual and own and usual.tag != own.tag else str(name)


def hub_config(model: nn.Module) -> dict[str, Any]:
    """What timm writes to the ``config.json`` of a model of its own, and reads from there and from the hub."""
    with TemporaryDirectory() as folder:
        save_as_timm(model, folder, safe_serialization=True)
        return dict(read_json(Path(folder) / "config.json"))
