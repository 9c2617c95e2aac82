"""Hugging Face's models by name: a folder or a repository that ``save_pretrained`` wrote, or a class and its config.

A class is one of the package ``transformers``, weights are safetensors. No code of a repository is run.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidt.errors import InputError
from sidt.export.hub import download, one_line, repository_in
from sidt.files import read_json
from sidt.space.trace import InputSize

PREFIX = "hf:"  # before a folder, or a repository of the hub
_CLASS = "transformers.models."  # before a class, as a checkpoint folder names it
_WHAT = "model of transformers"
_IMAGES = "preprocessor_config.json"
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's number


def is_named_here(name: str) -> bool:
    """Whether a name is of a model of Hugging Face: ``hf:FOLDER``, ``hf:OWNER/NAME`` or ``transformers.models...``."""
    return name.startswith((PREFIX, _CLASS))


def class_name_of(model: nn.Module) -> str | None:
    """The importable name of the class of a model of Hugging Face; ``None`` if it is not one of theirs."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return name if name.startswith(_CLASS) and hasattr(model, "config") else None


def args_of(model: nn.Module) -> dict[str, Any]:
    """The arguments that rebuild a model of Hugging Face: its config, and what its class takes beside that."""
    given: Any = model
    pooled = {"add_pooling_layer": given.pooler is not None} if _may_pool(type(model)) else {}
    return {**given.config.to_dict(), **pooled}


def build(name: str, args: Mapping[str, Any], *, pretrained: bool, input_size: InputSize | None) -> nn.Module:
    """A model of Hugging Face.

    Args:
        name: ``hf:`` and a folder or ``OWNER/NAME`` (``@REVISION``), or a class by its importable name.
        args: for the config, beside what the folder says; ``num_classes`` is ``num_labels``.
        pretrained: whether the weights are those of the folder or repository.
        input_size: channels, height, width that it is built for; default: the config's own.

    Raises:
        InputError: there is no such model or class, the arguments are not its own, or weights are missing.
    """
    args = dict(args)
    if "num_classes" in args:
        args["num_labels"] = args.pop("num_classes")
    if input_size is not None:
        channels, height, width = input_size
        args |= {"num_channels": channels, "image_size": height if height == width else [height, width]}
    try:
        if not name.startswith(PREFIX):
            return _of_class(_class_named(name), args)
        source = name.removeprefix(PREFIX)
        folder = Path(source) if Path(source).is_dir() else _config_of(source)
        cls = _class_in(folder)
        model = _with_weights(cls, source, folder, args) if pretrained else _of_class(cls, args, folder)
    except InputError:
        raise
    except (ImportError, TypeError, ValueError, RuntimeError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"transformers cannot build {name!r}: {reason}") from None
    model.pretrained_cfg = _preparation(folder)  # type: ignore[assignment]
    return model


# --- classes ---------------------------------------------------------------------------------------------------------


def _library() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InputError(
            "transformers is not installed, which models of Hugging Face need; install sidt[transformers]"
        ) from None


def _class_named(name: str) -> Any:
    """A class of the package, by its importable name."""
    library = _library()
    module, _, leaf = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), leaf)
    except (ImportError, AttributeError):
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, library.PreTrainedModel)):
        raise InputError(f"transformers {library.__version__} has no model {name}; is it of another version?")
    return cls


def _class_in(folder: Path) -> Any:
    """The class of the model in a folder; of a model of images and text, that of its part for images."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no {_WHAT}: it has no config.json; save one by save_pretrained")
    config, library = read_json(folder / "config.json"), _library()
    named = str((config.get("architectures") or [""])[0]) if isinstance(config, dict) else ""
    seen = f"{named.removesuffix('Model')}VisionModel" if named and "vision_config" in config else named
    cls = getattr(library, seen, None) if seen else None
    if not (isinstance(cls, type) and issubclass(cls, library.PreTrainedModel)):
        raise InputError(
            f"{folder / 'config.json'} says the class {named or 'of no name'}, and transformers {library.__version__} "
            f"has no model {seen or 'without one'}; code that comes with a model is never run"
        )
    return cls


def _config_of(source: str) -> Path:
    """The folder in the hub's cache with the config of a repository, and what it says of images."""
    repository = repository_in(source)
    if repository is None:
        raise InputError(f"there is no folder {source}, and it is no OWNER/NAME of the hub; write hf:OWNER/NAME")
    folder = download(*repository, ("config.json",), _WHAT)
    with suppress(InputError):  # some have none
        download(repository[0], folder.name, ("config.json", _IMAGES), _WHAT)
    return folder


# --- models ----------------------------------------------------------------------------------------------------------


@contextmanager
def _silent() -> Iterator[None]:
    """Without the table of what was loaded, and without bars."""
    says = _library().utils.logging
    level, bars = says.get_verbosity(), says.is_progress_bar_enabled()
    says.set_verbosity(says.CRITICAL)
    says.disable_progress_bar()
    try:
        yield
    finally:
        says.set_verbosity(level)
        if bars:
            says.enable_progress_bar()


def _may_pool(cls: type) -> bool:
    return "add_pooling_layer" in inspect.signature(cls.__init__).parameters  # type: ignore[misc]


def _of_class(cls: Any, args: Mapping[str, Any], folder: Path | None = None) -> nn.Module:
    """A model of a class with weights as it draws them."""
    args = dict(args)
    pooled = {"add_pooling_layer": args.pop("add_pooling_layer", True)} if _may_pool(cls) else {}
    known = cls.config_class
    config = known(**args) if folder is None else known.from_pretrained(folder, **args)
    model: nn.Module = cls(config, **pooled).eval()
    return model


def _with_weights(cls: Any, source: str, folder: Path, args: Mapping[str, Any]) -> nn.Module:
    """A model with published weights, in float32; a head of other classes is drawn anew, nothing else is."""
    options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True, **args}
    options["ignore_mismatched_sizes"] = True  # they are told, and refused below
    repository = None if Path(source).is_dir() else repository_in(source)
    if repository is not None:
        options["revision"] = folder.name
    at = str(folder) if repository is None else repository[0]
    with _silent(), nullcontext() if repository is None else one_line(at, _WHAT):
        model, says = cls.from_pretrained(at, **options)
        if (missing := set(says["missing_keys"])) and _may_pool(cls) and all("pooler." in key for key in missing):
            model, says = cls.from_pretrained(at, add_pooling_layer=False, **options)  # published without one
            missing = set(says["missing_keys"])
    missing |= {key if isinstance(key, str) else key[0] for key in says["mismatched_keys"]}
    if "num_labels" in args:
        missing = {key for key in missing if "classifier" not in key}
    if missing:
        raise InputError(
            f"the weights of {folder} are not those of {cls.__name__}: {sorted(missing)[0]} is missing or of another "
            f"shape ({len(missing)} in all); leave out arguments that change sizes"
        )
    model.eval()
    built: nn.Module = model
    return built


def _preparation(folder: Path) -> dict[str, Any]:
    """How a model's images are prepared, under timm's names, as far as its folder says it."""
    file = folder / _IMAGES
    says = read_json(file) if file.is_file() else {}
    cfg: dict[str, Any] = {}
    if says.get("do_normalize", True) and "image_mean" in says:
        cfg = {"mean": tuple(says["image_mean"]), "std": tuple(says["image_std"])}
    if isinstance(kind := says.get("resample"), int) and kind < len(_RESAMPLING):
        cfg["interpolation"] = _RESAMPLING[kind]
    size, crop = says.get("size"), says.get("crop_size")
    if isinstance(size, dict) and "shortest_edge" in size:
        side = crop.get("height") if isinstance(crop, dict) else crop
        cfg |= {"crop_pct": (side or size["shortest_edge"]) / size["shortest_edge"], "crop_mode": "center"}
    elif size is not None:
        cfg |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return cfg
