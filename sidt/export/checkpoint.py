"""Checkpoints: a folder of ``config.json``, ``plan.json`` and ``model.safetensors``. No pickle, no class of ours.

``config.json`` names the dense model for ``timm.create_model``, or a class of ``transformers`` with its config; the
plan says which of its units are left. A model whose search space does not come with SiDT takes the file along, as
``space.yaml``: data, that at most name modules.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from sidt.data.preparation import PREPARATION
from sidt.errors import InputError
from sidt.export.comparison import difference_between
from sidt.export.hub import download, repository_in
from sidt.export.models import create_model, maker_of, name_of, own_args
from sidt.export.weights import difference_of, fit_weights, load_weights
from sidt.files import dump_json, read_json, replacing, write_text
from sidt.space.families import Family, read_family
from sidt.space.finding import own_family, wrapped_in
from sidt.space.plan import DimensionPlan, load_plan
from sidt.space.space import space_for
from sidt.space.trace import InputSize, input_size_of
from sidt.sparsity.packing import packed, read_packed
from sidt.sparsity.structures import Structure
from sidt.surgery.slicing import slice_model

_FORMAT = "sidt-checkpoint-1"
FILES = ("config.json", "plan.json", "model.safetensors")
PACKED = "packed.safetensors"  # in place of the last, where weights have a structure
SPACE = "space.yaml"  # where the model's search space does not come with SiDT


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


_PREPARES: dict[str, Callable[[Any], bool]] = {  # what timm can take
    "mean": lambda value: isinstance(value, list) and bool(value) and all(map(_number, value)),
    "std": lambda value: isinstance(value, list) and bool(value) and all(_number(v) and v > 0 for v in value),
    "interpolation": lambda value: isinstance(value, str),
    "crop_pct": lambda value: _number(value) and value > 0,
    "crop_mode": lambda value: isinstance(value, str),
}


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    args: Mapping[str, Any] | None = None,
    structures: Mapping[str, Structure] | None = None,
    input_size: InputSize | None = None,
) -> None:
    """Write a dense or sliced model of timm or Hugging Face to a folder, so that :func:`load` gives it back.

    What it is rebuilt as is compared with the model first: names and shapes of its tensors, what its modules are and
    hold (head counts, scales, epsilons, windows), and what both make of one random image. The three files are written
    whole before the first of them replaces an older one.

    Args:
        model: a model from ``timm.create_model``, one of Hugging Face's, or what :func:`sidt.slice_model` made of one.
        folder: where to write; made if needed.
        name: the timm model name; default: what the model says of itself.
        args: the keyword arguments that rebuild the dense model with ``timm.create_model``; default: those that it was
            created with, and what its ``reset_classifier`` and ``set_input_size`` changed since, as timm keeps them.
        structures: of some weights, which are then packed (:mod:`sidt.sparsity`): ``packed.safetensors`` takes the
            place of ``model.safetensors``.
        input_size: channels, height, width of its images, of a class that does not say; default: those of the space
            that it was sliced by.

    Raises:
        InputError: name and args do not rebuild the model, a weight is not of its structure, or the folder cannot be
            written.
    """
    if (inner := wrapped_in(model)) is not None:
        raise InputError(f"this {type(model).__name__} wraps a model; save what is in it: model.{inner}")
    if name is not None and ":" in name:  # of a hub or a folder, which may change: the model says what it stands for
        name, args = None, own_args(model) | dict(args or {})
    name = name or name_of(model)
    if name is None:
        raise InputError(
            f"this {type(model).__name__} does not say its timm name; pass name= if timm builds it; of a class of your "
            f"own, save the plan and the weights (docs/backbone.md)"
        )
    args = as_json(own_args(model) if args is None else args)
    state = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    rotated = tuple(getattr(model, "sidt_rotated", ()))  # the widths whose units stand in order
    before = getattr(model, "sidt_plan", None)
    size = _unsaid_size(model, input_size or (before.space.trace.input_size if before is not None else None))
    rebuilt, plan = _rebuilt(name, args, rotated, before, own_family(model), size)
    difference = difference_of(rebuilt, state)
    if difference is None:
        weight = next(iter(state.values()))
        rebuilt.to(weight.device, weight.dtype if weight.is_floating_point() else None)
        rebuilt.load_state_dict(state, assign=True)  # the same tensors, so that there are no more of them
        difference = difference_between(model, rebuilt)
    if difference:
        raise InputError(
            f"{maker_of(name, args)} does not rebuild this model: {difference}; pass the keyword arguments that it was "
            f"created with as args="
        )
    config: dict[str, Any] = {"model": name, "args": args}
    if size is not None:
        config["input_size"] = list(size)
    if rotated:
        config["rotated"] = list(rotated)
    if preparation := _preparation(model, rebuilt):
        config["preprocessing"] = preparation
    write(Path(folder), config, plan, state, structures)


def write(
    folder: Path,
    config: Mapping[str, Any],
    plan: DimensionPlan,
    state: Mapping[str, Tensor],
    structures: Mapping[str, Structure] | None = None,
) -> None:
    """Write the files of a checkpoint, whole before the first of them replaces an older one.

    Args:
        folder: where to write; made if needed.
        config: model and args, and what else belongs there.
        plan: what is kept of the model that these build; its space brings the file, where it does not come with SiDT.
        state: the weights.
        structures: of some of them, which are then packed.

    Raises:
        InputError: the folder cannot be written, or a weight is not of its structure.
    """
    weights, other = (PACKED, FILES[2]) if structures else (FILES[2], PACKED)
    data = packed(state, structures) if structures else dump_tensors(dict(state), metadata={"format": "pt"})
    if plan.space.own is not None:
        write_text(folder / SPACE, plan.space.own.text)
    with (
        replacing(folder / "config.json") as config_file,
        replacing(folder / "plan.json") as plan_file,
        replacing(folder / weights) as weights_file,
    ):
        own = {"space": SPACE} if plan.space.own is not None else {}
        config_file.write_text(dump_json({"format": _FORMAT, **config, **own}), encoding="utf-8")
        plan_file.write_text(dump_json(plan.to_json()), encoding="utf-8")
        weights_file.write_bytes(data)
    for earlier in (other, *((SPACE,) if plan.space.own is None else ())):
        (folder / earlier).unlink(missing_ok=True)  # of an earlier model


def _unsaid_size(model: nn.Module, given: InputSize | None) -> InputSize | None:
    """The image size that a checkpoint has to keep: that of a model which does not say its own."""
    if hasattr(model, "sidt_input_size"):
        return given or input_size_of(model)
    try:
        input_size_of(model)
    except InputError:
        if given is None:
            raise
        return given
    return None


def _rebuilt(
    name: str,
    args: Mapping[str, Any],
    rotated: tuple[str, ...],
    plan: DimensionPlan | None,
    family: Family | None,
    size: InputSize | None,
) -> tuple[nn.Module, DimensionPlan]:
    """The model of a name, sliced by what a plan keeps where the dimensions are the same, and the plan on it.

    The plan may be on a model of another head or image size, since neither is a dimension.
    """
    dense = create_model(name, args)
    if family is not None:
        dense.sidt_family = family  # type: ignore[assignment]
    if rotated:
        dense.sidt_rotated = rotated  # type: ignore[assignment]
    if size is not None:
        dense.sidt_input_size = size  # type: ignore[assignment]
    space = space_for(dense)
    if plan is None or space.sizes != plan.space.sizes:
        return dense, DimensionPlan(space, {})
    plan = DimensionPlan(space, plan.keep)
    return slice_model(dense, plan), plan


def _preparation(model: nn.Module, rebuilt: nn.Module) -> dict[str, Any]:
    """How the model's images are prepared (``timm.data.resolve_model_data_config``), where timm would not know it."""
    own, usual = (getattr(m, "pretrained_cfg", None) or {} for m in (model, rebuilt))
    return {key: own[key] for key in PREPARATION if key in own and own[key] != usual.get(key)}


def as_json(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as they come back from the file."""
    for key, value in args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise InputError(
                f"the argument {key}={value!r} cannot be written as JSON; give save args= with a name that timm takes "
                f"for it, such as norm_layer='rmsnorm'"
            ) from None
    return dict(json.loads(json.dumps(dict(args))))


def load(source: str | Path) -> nn.Module:
    """Read a model that :func:`save` wrote, dense or sliced, on the CPU and in eval mode.

    Args:
        source: a folder, or a repository of the Hugging Face hub: ``hf-hub:OWNER/NAME``, with ``@REVISION`` if need be,
            or ``OWNER/NAME`` where there is no such folder.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others; or the hub does not have it.
    """
    folder = Path(source)
    if isinstance(source, str) and not folder.exists() and (found := repository_in(source)) is not None:
        try:
            folder = _download(*found)
        except InputError as error:
            raise InputError(str(error) if ":" in source else f"there is no folder {source}, and {error}") from None
    model = _built(folder)
    if (folder / PACKED).is_file():
        fit_weights(model, read_packed(folder / PACKED)[0], str(folder / PACKED))
    else:
        load_weights(model, folder / FILES[2])
    return model.eval()


def shapes_of(folder: str | Path) -> nn.Module:
    """The model of a checkpoint folder on the meta device: its shapes, without its weights.

    Raises:
        InputError: as for :func:`load`.
    """
    with torch.device("meta"):
        return _built(Path(folder)).eval()


def _built(folder: Path) -> nn.Module:
    """The model of a checkpoint folder, sliced, with weights as timm draws them."""
    config = _read_config(folder, str(folder / "config.json"))
    model = create_model(str(config.get("model")), config["args"])
    if config.get("space") is not None:
        model.sidt_family = read_family(folder / SPACE)  # type: ignore[assignment]
    if (rotated := config.get("rotated")) is not None:
        if not isinstance(rotated, list) or not all(isinstance(name, str) for name in rotated):
            raise InputError(f"{folder / 'config.json'}: rotated is {rotated!r}"[:200] + "; write a list of dimensions")
        model.sidt_rotated = tuple(rotated)  # type: ignore[assignment]
    if (size := config.get("input_size")) is not None:
        if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
            raise InputError(f"{folder / 'config.json'}: input_size is {size!r}"[:200] + "; write [3, height, width]")
        model.sidt_input_size = tuple(size)  # type: ignore[assignment]
    says = _preparation_in(config, str(folder / "config.json"))
    model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **says}  # type: ignore
    plan = load_plan(folder / "plan.json", space_for(model))
    return model if plan.sizes == plan.space.sizes else slice_model(model, plan)


def files_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The files of a checkpoint whose weights are not packed, given its config."""
    return FILES if config.get("space") is None else (*FILES, SPACE)


def _preparation_in(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """How a checkpoint's images are prepared, as timm has it."""
    says = config.get("preprocessing")
    if says is None:
        return {}
    if not isinstance(says, dict):
        raise InputError(f"{label}: preprocessing is {says!r}"[:200] + "; write a mapping, or leave it out")
    for key, value in says.items():
        if key in PREPARATION and not _PREPARES[key](value):
            raise InputError(f"{label}: preprocessing.{key} is {value!r}"[:200] + "; write it as timm's data config")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in says.items() if key in PREPARATION}


def _read_config(folder: Path, label: str) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no checkpoint: it has no config.json (with plan.json and model.safetensors)")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != _FORMAT or not isinstance(config.get("args"), dict):
        raise InputError(f"{label} is not the config of a checkpoint (format {_FORMAT!r})")
    return config


def _download(repository: str, revision: str | None) -> Path:
    """The folder of a checkpoint of the hub; what is none is refused before its weights come."""
    folder = download(repository, revision, FILES[:1], "SiDT checkpoint")
    config = _read_config(folder, f"config.json of {repository} on the hub")
    return download(repository, folder.name, files_of(config), "SiDT checkpoint")
