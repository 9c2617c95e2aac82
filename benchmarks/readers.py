"""Who reads each kind of file that SiDT takes, and how it is told that what was read is right."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from click.testing import CliRunner
from mmdet.datasets import CocoDataset
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import nn

from sidt.cli.commands import cli
from sidt.cost.complexity import report
from sidt.detection.data.annotations import check_annotations
from sidt.detection.detectors.checkpoints import load_detector
from sidt.errors import InputError
from sidt.export.checkpoint import load, save
from sidt.partition.devices import DevicesFile
from sidt.runs.checking import check_counted, half_of
from sidt.runs.compressing import opened
from sidt.runs.config import dump_config, read_config
from sidt.runs.folder import open_run
from sidt.space.families import INNER_KINDS
from sidt.space.plan import load_plan
from sidt.space.space import space_for
from sidt.sparsity.packing import pack, read_packed
from sidt.sparsity.structures import Structure
from sidt.surgery.slicing import slice_model

CONFIGS = Path(__file__).parents[1] / "configs"
SPACE = Path(__file__).parents[1] / "search_spaces" / "vit.yaml"


class WrongError(Exception):
    """A file was taken, and what came of it is not what it says."""


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        name: what it is, for the table.
        good: a good one.
        place: where a changed one is put, to be read.
        read: reads it, as a user would have it read; raises what that raises.
        check: says that what was read is right, or raises ``WrongError``.
        by: what reads it, in words.
        right: how it is told that what was read is right, in words.
        last_counts: whether of a key that is there twice the last counts, as to all others that read such files.
    """

    name: str
    good: Path
    place: Path
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None]
    by: str
    right: str
    last_counts: bool = False


def tiny() -> nn.Module:
    """A model for the check of a search-space file."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)


def command(*arguments: str) -> str:
    """What a command prints.

    Raises:
        InputError: as the command does; other exceptions too, which no command should.
    """
    done = CliRunner().invoke(cli, [*arguments], standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def readers(run: Path, detection: Path, digits: Path, scratch: Path) -> list[Reader]:
    """All kinds of files.

    Args:
        run: a run folder of a classifier, all of whose steps are done.
        detection: one of a detector.
        digits: the images of the detector.
        scratch: where changed files are put.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    whole, packed, sliced = scratch / "whole", scratch / "packed", scratch / "detector"
    shutil.copytree(run / "sliced", whole)
    shutil.copytree(detection / "sliced", sliced)
    structure = TypeAdapter(Structure).validate_python({"values": {"levels": 8}})
    model = load(run / "dense")
    weights = [f"blocks.{i}.mlp.{layer}.weight" for i in range(2) for layer in ("fc1", "fc2")]
    with torch.no_grad():
        for name in weights:
            model.get_parameter(name).copy_(structure.project(model.get_parameter(name)))
    save(model, packed, structures=dict.fromkeys(weights, structure))
    goods = scratch / "good"
    goods.mkdir()
    for folder in (whole, packed, sliced):
        shutil.copytree(folder, goods / folder.name)
    shutil.copy(run / "search" / "plan.json", goods / "plan.json")
    shutil.copy(detection / "search" / "plan.json", goods / "detection-plan.json")
    shutil.copy(SPACE, goods / "space.yaml")
    for name in ("fpga.yaml", "crossbar.yaml"):
        shutil.copy(CONFIGS / "sparsity" / name, scratch / name)
    annotations = digits / "annotations" / "val.json"
    return [
        Reader(
            "plan",
            goods / "plan.json",
            scratch / "plan.json",
            lambda path: command("complexity", str(run / "dense"), "--plan", str(path), "--format", "json"),
            lambda path, out: _plan(path, out, load(run / "dense")),
            "`sidt complexity MODEL --plan`",
            "the slice has as many parameters as the space counts; all else is as it was",
        ),
        Reader(
            "run config",
            run / "config.yaml",
            scratch / "config.yaml",
            lambda path: command("complexity", str(path), "--format", "json"),
            lambda path, out: _config(path),
            "`sidt complexity CONFIG`",
            "every value of the file is the value that counts, and it survives writing",
        ),
        Reader(
            "search space",
            goods / "space.yaml",
            scratch / "space.yaml",
            lambda path: command("spaces", "readers:tiny", "--file", str(path)),
            lambda path, out: _space(path),
            "`sidt spaces MODEL --file`",
            "the command's own (sliced is masked), and another slice costs what is counted",
        ),
        *(
            Reader(
                f"checkpoint: {name}",
                goods / folder.name / name,
                folder / name,
                lambda path: load(path.parent),
                lambda path, model, good=goods / folder.name: _checkpoint(path, model, load(good)),
                "`sidt.load`",
                "weights are those of the file, and of the good file's weights the same outputs",
            )
            for folder, name in (
                (whole, "config.json"),
                (whole, "plan.json"),
                (whole, "model.safetensors"),
                (packed, "packed.safetensors"),
            )
        ),
        Reader(
            "COCO annotations",
            annotations,
            scratch / "annotations.json",
            lambda path: check_annotations(path, digits / "val", tuple("0123456789")),
            lambda path, found: _annotations(path, found, digits),
            "`check_annotations`, as `sidt detect` calls it",
            "MMDetection reads as many images and boxes",
            last_counts=True,
        ),
        Reader(
            "detection plan",
            goods / "detection-plan.json",
            scratch / "detection-plan.json",
            lambda path: command("complexity", str(detection), "--plan", str(path), "--format", "json"),
            lambda path, out: _same_units(path, goods / "detection-plan.json"),
            "`sidt complexity RUN --plan`",
            "it keeps units that are there, and is for this backbone",
        ),
        Reader(
            "plan of a detector",
            goods / "detector" / "plan.json",
            sliced / "plan.json",
            lambda path: load_detector(path.parent),
            lambda path, found: _same_units(path, goods / "detector" / "plan.json"),
            "`load_detector`",
            "it keeps units that are there, as many as the weights have",
        ),
        Reader(
            "devices",
            CONFIGS / "sparsity" / "devices.yaml",
            scratch / "devices.yaml",
            lambda path: command("partition", str(goods / "whole"), "--devices", str(path)),
            lambda path, out: _devices(path),
            "`sidt partition`",
            "the command's own (shards compute what the model computes), and values are the file's",
        ),
        *(
            Reader(
                f"sparsity config: {name}",
                CONFIGS / "sparsity" / f"{name}.yaml",
                scratch / f"{name}.yaml",
                lambda path: opened(open_run(run), path, dense=True, say=lambda text: None),
                _compression,
                "what `sidt compress` checks first",
                "every structure packs and unpacks its weights bit for bit",
            )
            for name in ("levels", "tiles", "tprune")
        ),
    ]


def _plan(path: Path, out: str, model: nn.Module) -> None:
    space = space_for(model)
    plan = load_plan(path, space)
    small = slice_model(model, plan)
    counted = sum(p.numel() for p in small.parameters())
    told = json.loads(out)
    if not counted == report(space, plan.sizes).params:
        raise WrongError(f"{counted} parameters, and the command told {told}")
    _same_units(path, None)


def _same_units(path: Path, good: Path | None) -> None:
    """What a plan keeps are whole numbers in the file, each once; what it leaves out is kept whole, as documented."""
    values = json.loads(path.read_text())
    reference = None if good is None else json.loads(good.read_text())
    for name, kept in values["keep"].items():
        rows = kept if kept and isinstance(kept[0], list) else [kept]
        for row in rows:
            if not all(type(unit) is int and 0 <= unit < values["dense"][name] for unit in row):
                raise WrongError(f"{name} keeps {row[:4]}")
            if len(set(row)) < len(row):
                raise WrongError(f"{name} keeps a unit twice")
    if reference is not None and (values["model"], values["dense"]) != (reference["model"], reference["dense"]):
        raise WrongError("it is for another model")


def _config(path: Path) -> None:
    config = read_config(path)
    _counts(yaml.safe_load(path.read_text(encoding="utf-8")), config.model_dump(mode="json"), "")
    again = path.with_name("again.yaml")
    again.write_text(dump_config(config))
    if read_config(again) != config:
        raise WrongError("written and read again it is another")


def _counts(given: Any, used: Any, where: str) -> None:
    """Whether what a file says is what counts: each value of the one is in the other."""
    if isinstance(given, dict) and isinstance(used, dict):
        for key, value in given.items():
            _counts(value, used.get(key), f"{where}.{key}")
    elif isinstance(given, list) and isinstance(used, list):
        if len(given) != len(used):
            raise WrongError(f"{where}: {given} became {used}")
        for i, pair in enumerate(zip(given, used, strict=True)):
            _counts(*pair, f"{where}.{i}")
    elif given != used and str(given) != str(used) and not _equal(given, used):
        raise WrongError(f"{where}: {given!r} became {used!r}")


def _equal(given: Any, used: Any) -> bool:
    try:  # 0.10 as text, 1 as 1.0, yes as true; NaN is no number that anything should count by
        return float(given) == float(used)
    except (TypeError, ValueError, OverflowError):
        return given is False and used == "no"


def _space(path: Path) -> None:
    model = tiny().eval()
    space = space_for(model, file=path)
    check_counted(model, half_of(space, INNER_KINDS, seed=1))


def _checkpoint(path: Path, model: nn.Module, good: nn.Module) -> None:
    size = (1, 3, 16, 16)
    image = torch.randn(size, generator=torch.Generator().manual_seed(0))
    if path.suffix == ".safetensors":
        there = read_packed(path)[0] if path.name.startswith("packed") else load_file(path)
        state = model.state_dict()
        if set(there) != set(state) or not all(_same(there[name].to(state[name].dtype), state[name]) for name in there):
            raise WrongError("the weights are not those of the file")
        if any(t.dtype != state[n].dtype for n, t in there.items()):
            raise WrongError("weights of another type were taken")
        if path.name.startswith("packed"):
            _packs(path)
        return
    with torch.no_grad():
        if not torch.equal(model(image), good(image)):
            raise WrongError("it computes something else")
    preparation = [getattr(m, "pretrained_cfg", None) or {} for m in (model, good)]
    if path.name == "config.json":
        data = timm.data.resolve_model_data_config(model)
        if not all(isinstance(data[key], tuple) and all(map(math.isfinite, data[key])) for key in ("mean", "std")):
            raise WrongError(f"its images are prepared by {data}")
    elif preparation[0] != preparation[1]:
        raise WrongError("its images are prepared in another way")


def _packs(path: Path) -> None:
    state, structures = read_packed(path)
    for name, structure in structures.items():
        pack(state[name], structure)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _annotations(path: Path, found: Any, digits: Path) -> None:
    with redirect_stdout(StringIO()):
        data = CocoDataset(
            ann_file=str(path),
            data_prefix={"img": str(digits / "val")},
            metainfo={"classes": tuple("0123456789")},
            pipeline=[],
        )
    boxes = sum(
        1
        for item in (data.get_data_info(i) for i in range(len(data)))
        for b in item["instances"]
        if not b["ignore_flag"]
    )
    if (len(data), boxes) != (found.images, found.boxes):
        raise WrongError(
            f"MMDetection reads {len(data)} images and {boxes} boxes, SiDT {found.images} and {found.boxes}"
        )


def _devices(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    _counts(tree, DevicesFile.model_validate(tree).model_dump(mode="json"), "")


def _compression(path: Path, found: Any) -> None:
    _counts(yaml.safe_load(path.read_text(encoding="utf-8")), found.config.model_dump(mode="json"), "")
    for name, structure in found.structures.items():
        weight = structure.project(found.model.get_parameter(name).detach())
        try:
            pack(weight, structure)
        except InputError as error:
            raise WrongError(f"{name}: {error}") from None
