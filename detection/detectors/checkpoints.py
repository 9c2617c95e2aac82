"""Detectors on disk: a folder of ``config.py``, ``model.safetensors`` and, if it is sliced, ``plan.json``.

``config.py`` is a normal MMDetection config that finds the other two beside itself, so MMDetection's own tools take
the folder as it is, wherever it lies. Where weights have a structure, ``packed.safetensors`` takes the place of
``model.safetensors``. A backbone whose search space does not come with SiDT brings the file, as ``space.yaml``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_torch_safe_globals
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from sidt.detection.detectors.backbones import map_dimensions, searchable
from sidt.detection.detectors.configs import build_detector, channels_of, maps_of, read_config, readers, without_weights
from sidt.detection.detectors.sliced_parts import slice_parts
from sidt.errors import InputError
from sidt.export.checkpoint import PACKED, SPACE, files_of
from sidt.export.weights import fit_weights, read_weights
from sidt.files import dump_json, read_json, replacing
from sidt.space.families import read_family
from sidt.space.finding import own_family
from sidt.space.plan import DimensionPlan
from sidt.space.space import Dimension
from sidt.sparsity.packing import packed, read_packed
from sidt.sparsity.structures import Structure

CONFIG, PLAN, WEIGHTS = "config.py", "plan.json", "model.safetensors"
_HERE = "{{ fileDirname }}"  # MMEngine puts the config's own folder here
_MODELS = "sidt.detection.models"
_ROTATED = "sidt_rotated"  # in a config, as on a detector: the widths whose units stand in order


def weights_in(folder: Path) -> Path:
    """The file of a detector's weights in its folder: ``packed.safetensors`` if it is there."""
    return folder / PACKED if (folder / PACKED).is_file() else folder / WEIGHTS


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights of an MMEngine checkpoint, a torch file of tensors, or a safetensors file; no code is run.

    Packed weights are unpacked.

    Raises:
        InputError: the file is missing, damaged or holds code.
    """
    if Path(path).name == PACKED:
        return read_packed(Path(path))[0]
    return read_weights(path, known=get_torch_safe_globals())


def weights_digest(path: str | Path) -> str:
    """Tells weights apart by their tensors: the same ones may be written as other bytes (safetensors' metadata)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_checkpoint(path).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(detector: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a detector, strictly.

    Raises:
        InputError: it cannot be read, or is another model's.
    """
    fit_weights(detector, read_checkpoint(path), str(path))


def save_detector(
    detector: nn.Module,
    config: Config,
    folder: Path,
    classes: Sequence[str],
    structures: Mapping[str, Structure] | None = None,
) -> None:
    """Write a detector, dense or sliced, as a folder; the files are whole before the first replaces an older one.

    Args:
        detector: its weights are written, and its plan if it has one.
        config: the config that it was built from; of a sliced detector, that of the dense one.
        folder: where to write.
        classes: the names of the classes, for whoever loads it.
        structures: of some weights, which are then packed.

    Raises:
        InputError: the folder cannot be written, or a weight is not of its structure.
    """
    plan: DimensionPlan | None = getattr(detector, "sidt_plan", None)
    own = Config(config.to_dict())
    if own.model.backbone.type != "SlicedBackbone":
        own.model["backbone"] = without_weights(own.model.backbone.to_dict())
    imports = list((own.get("custom_imports") or {}).get("imports", ()))
    if _MODELS not in imports:
        own.custom_imports = {"imports": [*imports, _MODELS], "allow_failed_imports": False}
    own.pop(_ROTATED, None)
    if rotated := getattr(detector, _ROTATED, ()):
        own[_ROTATED] = list(rotated)
    if plan is not None:
        _slice_config(own, plan, map_dimensions(detector.get_submodule("backbone"), plan.space))
        slice_parts(own, detector, plan.space)
    dense = own.model.backbone.dense if plan is not None else own.model.backbone
    files: dict[str, bytes] = {}
    if dense.type == "TimmBackbone" and Path(dense.model).is_dir():  # it says what the dense backbone is
        names = files_of(read_json(Path(dense.model) / "config.json"))
        files = {f"backbone/{name}": (Path(dense.model) / name).read_bytes() for name in names}
        dense.model = f"{_HERE}/backbone"
    if (family := own_family(searchable(detector.get_submodule("backbone"))[1])) is not None:
        files[SPACE] = family.text.encode()
        if plan is not None:
            own.model.backbone.space = f"{_HERE}/{SPACE}"
    weights, other = (PACKED, WEIGHTS) if structures else (WEIGHTS, PACKED)
    own.load_from = f"{_HERE}/{weights}"
    state = {k: v.detach().cpu().contiguous().clone() for k, v in detector.state_dict().items()}
    meta = {"format": "pt", "dataset_meta": json.dumps({"classes": list(classes)})}
    data = packed(state, structures, meta) if structures else dump_tensors(state, metadata=meta)
    files |= {CONFIG: own.dump().encode(), weights: data}
    if plan is not None:
        files[PLAN] = dump_json(plan.to_json()).encode()
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(replacing(folder / name)).write_bytes(content)
    (folder / other).unlink(missing_ok=True)  # of an earlier detector
    for name in {PLAN, SPACE} - set(files):
        (folder / name).unlink(missing_ok=True)


def _slice_config(config: Config, plan: DimensionPlan, maps: Sequence[str]) -> None:
    """Turn the config of a dense detector into that of the sliced one."""
    dense = config.model.backbone
    dense = (dense.dense if dense.type == "SlicedBackbone" else dense).to_dict()
    config.model["backbone"] = {"type": "SlicedBackbone", "dense": dense, "plan": f"{_HERE}/{PLAN}"}
    for reader, _ in readers(config.model):
        if (given := channels_of(reader)) is not None:
            channels = [plan.sizes[name] for name in maps_of(reader, maps)]
            reader.in_channels = channels if isinstance(given, list | tuple) else channels[0]


def load_detector(folder: str | Path) -> tuple[nn.Module, Config]:
    """Read a detector that :func:`save_detector` wrote, on the CPU and in eval mode, with its config.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not weights_in(folder).is_file():
        raise InputError(f"{folder} is no detector: it has no {CONFIG} with {WEIGHTS} or {PACKED}")
    config = read_config(folder / CONFIG)
    detector = build_detector(config)
    load_weights(detector, weights_in(folder))
    module: Any = searchable(detector.get_submodule("backbone"))[1]
    if (folder / SPACE).is_file():
        module.sidt_family = read_family(folder / SPACE)
    plan = getattr(module, "sidt_plan", None)
    if plan is not None:
        detector.sidt_plan = _with_channels(plan, read_json(folder / PLAN))  # type: ignore[assignment]
    if rotated := config.get(_ROTATED):
        detector.sidt_rotated = tuple(map(str, rotated))  # type: ignore[assignment]
    return detector.eval(), config


def _with_channels(plan: DimensionPlan, data: Any) -> DimensionPlan:
    """The plan of a detector: that of its backbone, and what its file says of the channels of neck and heads."""
    try:
        own = {
            str(name): Dimension(str(name), "channels", int(data["dense"][name]), None, (), False)
            for name in data.get("channels", [])
        }
        space = replace(plan.space, dimensions={**plan.space.dimensions, **own})
        return DimensionPlan(space, {**plan.keep, **{name: np.array(data["keep"][name]) for name in own}})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the channels in a detector's {PLAN} cannot be read: {error!r}") from None


def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """What MMEngine expects of a checkpoint, from a safetensors file that :func:`save_detector` wrote."""
    with safe_open(filename, framework="pt") as file:
        meta = (file.metadata() or {}).get("dataset_meta")
    device = map_location if isinstance(map_location, str | torch.device) else "cpu"
    if Path(filename).name == PACKED:
        state = {name: tensor.to(device) for name, tensor in read_packed(Path(filename))[0].items()}
    else:
        state = load_file(filename, device=str(device))
    return {"state_dict": state, "meta": {"dataset_meta": json.loads(meta)} if meta else {}}


def register_safetensors() -> None:
    """Let MMEngine load checkpoints from ``*.safetensors``, wherever it takes a checkpoint."""
    CheckpointLoader.register_scheme(r".*\.safetensors$", load_from_safetensors, force=True)
