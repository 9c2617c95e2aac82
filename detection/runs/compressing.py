"""``sidt compress`` on a detection run: structure inside the weights of its detector, trained on the detector's losses.

::

    the run's result (or its dense detector) -> reach: trained towards the structures -> projected/
    -> finetune: trained under the masks -> compressed/NAME/: config.py, plan.json, packed.safetensors, as a
    detector's folder; compressed.json, report.md, structure.png

MMEngine trains as the detector's own config says, with the run's options. Of a compression's ``train`` and
``finetune``, which are written for classifiers, three keys count: ``epochs`` (``max_epochs``), ``lr`` (of the
optimiser) and ``sched`` (to 0, iteration by iteration, or constant); of ``teacher`` the weight of the ``features``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from sidt.detection.data.sources import with_data
from sidt.detection.detectors.checkpoints import WEIGHTS, load_detector, load_weights, save_detector, weights_in
from sidt.detection.detectors.space import detector_space, predict
from sidt.detection.runs.data import TRAIN, checked, split_data
from sidt.detection.runs.folder import CHAIN, DetectionRun, existing, input_size, open_detector
from sidt.detection.runs.objective import Say
from sidt.detection.runs.pipeline import evaluate_detector
from sidt.detection.training.evaluation import results_table
from sidt.detection.training.loop import train
from sidt.errors import InputError
from sidt.files import write_bytes
from sidt.report.kept import STAGES, devices_of, latency, modelled, weights_kept, write_report
from sidt.runs import provenance
from sidt.space.space import DimensionSpace
from sidt.sparsity.config import CompressConfig, read_config, structures_of
from sidt.sparsity.engines import check_engine
from sidt.sparsity.structures import Structure
from sidt.training.loop import TrainConfig


@dataclass
class Compression:
    """A compression of a detector on its way.

    Attributes:
        run: the run.
        asked: what is asked for.
        beside: the folder of the config.
        source: the folder of the detector that it starts from.
        folder: where it goes.
        config: of the detector, to train it on the run's training images and to test it.
        classes: the names of the classes.
        detector: as it is now.
        space: its space.
        structures: of the weights that have one.
        found: what stages found, for the report.
    """

    run: DetectionRun
    asked: CompressConfig
    beside: Path
    source: Path
    folder: Path
    config: Config
    classes: tuple[str, ...]
    detector: nn.Module
    space: DimensionSpace
    structures: dict[str, Structure]
    found: dict[str, Any] = field(default_factory=dict)


def compress(run: DetectionRun, path: Path, *, dense: bool = False, say: Say = print) -> str:
    """Compress the detector of a run as a config says.

    Args:
        run: the run.
        path: the config; its name is that of the folder, ``compressed/NAME``.
        dense: take the dense detector and not the run's result.
        say: told what is done.

    Returns:
        The report.

    Raises:
        InputError: the config cannot be used on a detector, a structure is not for it, or the run has no detector.
    """
    at = opened(run, path, dense=dense)
    say(_cost(at))
    _judge(at, "before", at.source, say)
    reach(at)
    masks = _masked(at)
    start = dump_tensors({n: t.contiguous() for n, t in at.detector.state_dict().items()}, metadata={"format": "pt"})
    _round(at, masks)
    if asked := at.asked.finetune:
        _save(at, at.folder / "projected")
        _judge(at, "projected", at.folder / "projected", say)
        finetune(at, asked, start, masks)
    _save(at, at.folder)
    _judge(at, "after", at.folder, say)
    return _write(at)


def opened(run: DetectionRun, path: Path, *, dense: bool) -> Compression:
    """A compression that has not begun: everything is checked that can be.

    Raises:
        InputError: as for :func:`compress`.
    """
    asked = read_config(path)
    _check(asked, path)
    devices_of(asked, path.parent)
    source = existing(run, "dense", "train CONFIG") if dense else _result(run)
    changed = {**run.options, **run.settings.finetune}
    detector, config = open_detector(DetectionRun(run.folder, run.config, run.settings, changed, run.data_root), source)
    if "max_iters" in (config.get("train_cfg") or {}):
        raise InputError(
            f"{source} trains by iterations (train_cfg.max_iters), and {path} counts epochs; set max_epochs"
        )
    space = detector_space(detector, config.model, input_size(run))
    structures = structures_of(detector, asked.structures, space)
    check_engine(detector, structures, asked.engine)
    data = checked(run, detector, TRAIN)
    config = with_data(config, TRAIN, split_data(run, data)["rest"])
    folder = run.folder / "compressed" / (f"dense-{path.stem}" if dense else path.stem)
    return Compression(run, asked, path.parent, source, folder, config, data.classes, detector, space, structures)


def _result(run: DetectionRun) -> Path:
    """The folder of the run's fine-tuned detector, else of its sliced one."""
    provenance.inputs(run.folder, CHAIN, "evaluate")
    return run.folder if (run.folder / WEIGHTS).is_file() else existing(run, "sliced", "search")


def _check(asked: CompressConfig, path: Path) -> None:
    """Refuse what is for classifiers alone."""
    given = {
        "align": asked.align,
        "reach.by: surgeon": asked.reach.by == "surgeon",
        "survey": asked.survey is not None,
        "purify": asked.purify is not None,
        "unused": asked.unused,
        "images": asked.images is not None,
        "reach.groups: units": asked.reach.groups == "units",
        f"engine: {asked.engine}": asked.engine in ("2:4", "int8"),
        "teacher.features: 0": asked.teacher is not None and not asked.teacher.features,
    }
    if wrong := [key for key, there in given.items() if there]:
        raise InputError(f"{path}: {', '.join(wrong)} cannot be had of a detector; leave it out")
    if not asked.structures:
        raise InputError(f"{path}: no structures, and a detector is compressed by them alone; give some")


def _rounds(at: Compression) -> int:
    """How many times its epochs the training towards the structures takes."""
    return {"projection": 0, "admm": at.asked.reach.rounds}.get(at.asked.reach.by, 1)


def _cost(at: Compression) -> str:
    """What is about to be done, in epochs."""
    epochs = {
        at.asked.reach.by: at.asked.reach.train.epochs * _rounds(at),
        "finetune": at.asked.finetune.epochs if at.asked.finetune else 0,
    }
    shown = ", ".join(f"{name} {count}" for name, count in epochs.items() if count) or "no training"
    return f"{len(at.structures)} weights have a structure; epochs: {shown}"


# --- the stages ----------------------------------------------------------------------------------------------------


def reach(at: Compression) -> None:
    """Train the detector towards its structures."""
    asked = at.asked.reach
    if epochs := asked.train.epochs * _rounds(at):
        hook = _hook(at) | {"reach": asked.model_dump(mode="json")}
        load_weights(at.detector, _train(at, weights_in(at.source), "reach", asked.train, epochs, hook))


def finetune(at: Compression, asked: TrainConfig, start: bytes, masks: Mapping[str, Tensor]) -> None:
    """Train the detector under its masks and values, and round it to them.

    Args:
        at: the compression.
        asked: how.
        start: the weights to start from, masked and not rounded yet: a safetensors file.
        masks: of weights.
    """
    if not asked.epochs:
        return
    file = at.folder / "states" / "start.safetensors"
    write_bytes(file, start)
    load_weights(at.detector, _train(at, file, "finetune", asked, asked.epochs, _hook(at)))
    _round(at, masks)


def _hook(at: Compression) -> dict[str, Any]:
    return {
        "type": "StructuresHook",
        "structures": [layers.model_dump(mode="json") for layers in at.asked.structures],
    }


def _train(
    at: Compression, weights: Path, label: str, asked: TrainConfig, epochs: int, hook: Mapping[str, Any]
) -> Path:
    """Train by MMEngine from weights on; a stopped training goes on.

    Returns:
        The checkpoint of the last epoch.
    """
    config = Config(at.config.to_dict(), filename=at.config.filename)
    fall = {"type": "CosineAnnealingLR", "eta_min": 0.0, "begin": 0, "end": epochs, "convert_to_iter_based": True}
    config.merge_from_dict(
        {
            "train_cfg.max_epochs": epochs,
            "train_cfg.val_begin": epochs + 1,  # the stages are judged anyway
            "optim_wrapper.optimizer.lr": asked.lr,
        }
    )
    config.param_scheduler = [] if asked.sched == "constant" else [fall]
    hooks = [*(config.get("custom_hooks") or []), dict(hook)]
    if at.asked.teacher is not None:
        teacher = {"folder": str(at.source.resolve()), "features": at.asked.teacher.features}
        hooks.append({"type": "TeacherHook", **teacher})
    config.custom_hooks = hooks
    return train(config, weights, at.folder / "states", label)


@torch.no_grad()
def _masked(at: Compression) -> dict[str, Tensor]:
    """Make zero what the structures leave out; values are not rounded yet.

    Returns:
        What is kept.
    """
    masks = {name: structure.mask(at.detector.get_parameter(name)) for name, structure in at.structures.items()}
    for name, mask in masks.items():
        weight = at.detector.get_parameter(name)
        weight.copy_(torch.where(mask, weight, 0.0))
    # The hook makes its masks of these weights: of a mask's own weight the same, or one of no other values.
    return {name: structure.mask(at.detector.get_parameter(name)) for name, structure in at.structures.items()}


@torch.no_grad()
def _round(at: Compression, masks: Mapping[str, Tensor]) -> None:
    """Make weights what they read as under their masks."""
    for name, mask in masks.items():
        weight = at.detector.get_parameter(name)
        weight.copy_(at.structures[name].rounded(weight, mask))


def _save(at: Compression, folder: Path) -> None:
    """Write the detector, with its weights packed."""
    save_detector(at.detector, load_detector(at.source)[1], folder, at.classes, at.structures)


def _judge(at: Compression, stage: str, folder: Path, say: Say) -> None:
    """COCO's scores of a detector's folder."""
    row = evaluate_detector(folder, at.config, input_size(at.run), latency=False)
    at.found[stage] = row
    say(f"{stage}: " + ", ".join(f"{kind} AP {row[kind]['AP'] or 0.0:.2%}" for kind in ("bbox", "segm") if kind in row))


def _write(at: Compression) -> str:
    """Write what was found, and give the report."""
    detector, size = load_detector(at.folder)[0], input_size(at.run)  # what comes out of the file
    image = torch.randn(1, *size)
    at.found |= {
        "bytes": weights_in(at.folder).stat().st_size,
        "dense_bytes": (at.run.folder / "dense" / WEIGHTS).stat().st_size,
        "weights": weights_kept(detector, at.structures),
        "modelled": modelled(detector, at.space.trace.positions, at.asked, at.beside),
        "latency_ms": latency(detector, at.structures, at.asked, lambda twin: predict(twin, image)),
        "params": at.found["after"]["params"],
        "params_before": at.found["before"]["params"],
        "config": at.asked.model_dump(mode="json"),
    }
    there = {stage: at.found[stage] for stage in STAGES if stage in at.found}
    rows = {stage: {k: row[k] for k in ("bbox", "segm") if k in row} for stage, row in there.items()}
    return write_report(at.found, results_table(rows, "md"), detector, at.structures, at.folder)
