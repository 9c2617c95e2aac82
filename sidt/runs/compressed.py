"""A run's compression from end to end: its stages, each judged, and the packed checkpoint they leave."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidt.data.preparation import preparation_of
from sidt.export.checkpoint import PACKED, load, save
from sidt.export.onnx import as_onnx
from sidt.files import write_bytes
from sidt.report.kept import STAGES, latency, modelled, weights_kept, write_report
from sidt.report.tables import table
from sidt.report.text import percent, quality
from sidt.runs.compressing import (
    Compression,
    Say,
    aligned,
    cut,
    finetune,
    opened,
    purified,
    reach,
    survey,
    without_unused,
)
from sidt.runs.folder import Run, dense_model
from sidt.runs.images import data_of
from sidt.runs.quality import evaluate_on

ONNX = "model-int8.onnx"


def compress(run: Run, path: Path, *, dense: bool = False, say: Say = print) -> str:
    """Compress the model of a run as a config says; see :mod:`sidt.runs.compressing`.

    Args:
        run: the run.
        path: the config; its name is that of the folder, ``compressed/NAME``.
        dense: take the dense model and not the run's result.
        say: told what is done.

    Returns:
        The report.

    Raises:
        InputError: the config cannot be used, a structure is not for the model, or the run has no model.
    """
    at = opened(run, path, dense=dense, say=say)
    say(_cost(at))
    _judge(at, "before", at.before)
    if at.config.align:
        aligned(at)
    survey(at)
    reach(at)
    cut(at)
    if at.config.purify is not None:
        _judge(at, "cut", at.model)
        purified(at, at.config.purify)
    if at.config.unused:
        without_unused(at)
    if at.structures or at.config.reach.groups == "units":
        _judge(at, "projected", _rounded(at))
    finetune(at)
    return _write(at)


def _cost(at: Compression) -> str:
    """What is about to be done, in images that are trained on."""
    reach, images = at.config.reach, len(data_of(at.run.config.data).train)
    epochs = {
        "survey": at.config.survey.train.epochs if at.config.survey else 0,
        reach.by: reach.train.epochs * (reach.rounds if reach.by == "admm" else 1) if reach.trains else 0,
        "finetune": at.config.finetune.epochs if at.config.finetune else 0,
    }
    each = min(images, at.config.images or images)
    shown = ", ".join(f"{name} {count}" for name, count in epochs.items() if count) or "no training"
    return f"{len(at.structures)} weights have a structure; epochs of {each:,} images: {shown}"


def _judge(at: Compression, stage: str, model: nn.Module) -> None:
    """Note how good the model of a stage is on the test images."""
    at.found[stage] = evaluate_on(at.run, dense_model(at.run), model, data_of(at.run.config.data).test)[0]
    at.say(f"{stage}: {_says(at.found[stage])}")


def _says(row: dict[str, float]) -> str:
    what, part = quality(row)
    return f"{percent(part)} {what}"


def _rounded(at: Compression) -> nn.Module:
    """A copy with its values rounded."""
    model = copy.deepcopy(at.model)
    with torch.no_grad():
        for name, structure in at.structures.items():
            weight = model.get_parameter(name)
            weight.copy_(structure.rounded(weight, weight != 0))
    return model


class _Session(nn.Module):
    """An exported model, as one that can be judged."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.run(images)
        return torch.as_tensor(logits)


def _write(at: Compression) -> str:
    """Write all of it, and give the report."""
    model, size = at.model.eval(), (3, *preparation_of(at.run.config.data).size)
    save(model, at.folder, structures=at.structures)
    file = at.folder / (PACKED if at.structures else "model.safetensors")
    if at.config.engine == "int8":
        exported = as_onnx(model, size, dynamic_batch=True, opset=None, precision="int8")
        file = at.folder / ONNX
        write_bytes(file, exported.data)
        _judge(at, "after", _Session(exported.run))
    else:
        _judge(at, "after", load(at.folder))  # what comes out of the file
    image = torch.randn(1, *size)
    at.found |= {
        "bytes": file.stat().st_size,
        "dense_bytes": (at.run.folder / "dense" / "model.safetensors").stat().st_size,
        "weights": weights_kept(model, at.structures),
        "modelled": modelled(model, at.space.trace.positions, at.config, at.path.parent),
        "latency_ms": latency(model, at.structures, at.config, lambda twin: twin(image)),
        "params": sum(p.numel() for p in model.parameters()),
        "params_before": sum(p.numel() for p in at.before.parameters()),
        "config": at.config.model_dump(mode="json"),
    }
    return write_report(at.found, _quality(at), model, at.structures, at.folder)


def _quality(at: Compression) -> str:
    """The quality of each stage, as a table."""
    stages = {stage: at.found[stage] for stage in STAGES if stage in at.found}
    rows = [[stage, _says(row), f"+- {percent(row['error'])}"] for stage, row in stages.items()]
    return table(["model", "quality", "one standard error"], rows, "md")
