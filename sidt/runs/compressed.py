"""What a compression leaves: the packed checkpoint, its numbers and its report."""

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidt.cost.clock import processor, time_in_turn
from sidt.export.checkpoint import PACKED, load, save
from sidt.export.onnx import as_onnx
from sidt.files import write_bytes, write_json, write_text
from sidt.hardware.crossbars import CrossbarDevice, count_crossbars
from sidt.hardware.device import read_device
from sidt.hardware.fpga import FpgaDevice, count_cycles
from sidt.runs.compressing import Compression, Say, finetune, harden, opened, reach, survey
from sidt.runs.folder import Run, dense_model
from sidt.runs.images import data_of
from sidt.runs.plots import plot_structures
from sidt.runs.quality import evaluate_on
from sidt.runs.report import percent, quality
from sidt.runs.tables import table
from sidt.sparsity.engines import block_sparse
from sidt.training.preparation import preparation_of

RESULT, ONNX = "compressed.json", "model-int8.onnx"


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
    at.found["before"] = _judged(at, at.before)
    say(f"before: {_says(at.found['before'])}")
    survey(at)
    reach(at)
    masks = harden(at)
    if at.structures or at.config.reach.groups == "units":
        at.found["projected"] = _judged(at, _rounded(at, masks))
        say(f"projected: {_says(at.found['projected'])}")
    finetune(at, masks)
    return _write(at)


def _cost(at: Compression) -> str:
    """What is about to be done, in images that are trained on."""
    reach, images = at.config.reach, len(data_of(at.run.config.data).train)
    epochs = {
        "survey": at.config.survey.train.epochs if at.config.survey else 0,
        reach.by: 0 if reach.by == "projection" else reach.train.epochs * (reach.rounds if reach.by == "admm" else 1),
        "finetune": at.config.finetune.epochs if at.config.finetune else 0,
    }
    each = min(images, at.config.images or images)
    shown = ", ".join(f"{name} {count}" for name, count in epochs.items() if count) or "no training"
    return f"{len(at.structures)} weights have a structure; epochs of {each:,} images: {shown}"


def _judged(at: Compression, model: nn.Module) -> dict[str, float]:
    return evaluate_on(at.run, dense_model(at.run), model, data_of(at.run.config.data).test)[0]


def _says(row: dict[str, float]) -> str:
    what, part = quality(row)
    return f"{percent(part)} {what}"


def _rounded(at: Compression, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with its values rounded as they are now."""
    model = copy.deepcopy(at.model)
    with torch.no_grad():
        for name, structure in at.structures.items():
            weight = model.get_parameter(name)
            weight.copy_(structure.rounded(weight, masks[name]))
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
        at.found["after"] = _judged(at, _Session(exported.run))
    else:
        at.found["after"] = _judged(at, load(at.folder))  # what comes out of the file
    dense = at.run.folder / "dense" / "model.safetensors"
    at.found |= {
        "bytes": file.stat().st_size,
        "dense_bytes": dense.stat().st_size,
        "weights": _weights(at),
        "modelled": _modelled(at),
        "latency_ms": _latency(at, size) if at.config.engine == "block-sparse" else {},
        "params": sum(p.numel() for p in model.parameters()),
        "params_before": sum(p.numel() for p in at.before.parameters()),
        "config": at.config.model_dump(mode="json"),
    }
    write_json(at.folder / RESULT, at.found)
    if at.structures:
        plot_structures({n: at.model.get_parameter(n).detach() for n in at.structures}, at.folder / "structure.png")
    text = report(at.found, at.path.stem)
    write_text(at.folder / "report.md", text)
    return f"{text}\n-> {at.folder}"


def _weights(at: Compression) -> dict[str, dict[str, Any]]:
    """What is left of each weight that has a structure, and its bits."""
    found = {}
    for name, structure in at.structures.items():
        weight = at.model.get_parameter(name).detach()
        bits = structure.bits(weight)
        found[name] = {
            "shape": list(weight.shape),
            "entries": weight.numel(),
            "nonzero": int((weight != 0).sum()),
            "values": bits.values,
            "index": bits.index,
            "scales": bits.scales,
        }
    return found


def _modelled(at: Compression) -> dict[str, Any]:
    """Cycles and crossbars of the model as it was and as it is."""
    found: dict[str, Any] = {}
    positions = at.space.trace.positions
    if at.config.fpga is not None:
        fpga = read_device(FpgaDevice, at.path.parent / at.config.fpga)
        cycles = count_cycles(at.model, positions, fpga)
        found["cycles"] = [sum(c.dense_cycles for c in cycles), sum(c.cycles for c in cycles)]
    if at.config.crossbar is not None:
        crossbar = read_device(CrossbarDevice, at.path.parent / at.config.crossbar)
        counts = count_crossbars(at.model, positions, crossbar)
        found["crossbars"] = [sum(c.dense_crossbars for c in counts), sum(c.crossbars for c in counts)]
    return found


def _latency(at: Compression, size: tuple[int, int, int]) -> dict[str, float]:
    """Milliseconds of one image: dense matrix products beside torch's block-sparse ones, in turn."""
    twin, image = block_sparse(at.model, at.structures), torch.randn(1, *size)
    with torch.inference_mode():
        return time_in_turn({"dense": lambda: at.model(image), "block-sparse": lambda: twin(image)})


def report(found: dict[str, Any], name: str) -> str:
    """The report of a compression, as Markdown."""
    rows = [[stage, _says(found[stage]), f"+- {percent(found[stage]['error'])}"] for stage in _STAGES if stage in found]
    text = f"# {name}\n\n{table(['model', 'quality', 'one standard error'], rows, 'md')}\n\n"
    ratio = found["dense_bytes"] / found["bytes"]
    text += f"{found['bytes']:,} bytes, {ratio:.1f} times smaller than the dense file's {found['dense_bytes']:,}. "
    text += f"{found['params']:,} of {found['params_before']:,} parameters are in the model.\n\n"
    for what, (whole, left) in found["modelled"].items():
        text += f"{what.capitalize()} (modelled): {left:,} of {whole:,}, {left / max(whole, 1):.1%}.\n\n"
    if found["latency_ms"]:
        times = ", ".join(f"{how} {ms:.2f} ms" for how, ms in found["latency_ms"].items())
        text += f"One image: {times}; {processor()}, torch threads: {torch.get_num_threads()}.\n\n"
    if found["weights"]:
        text += f"{_by_kind(found['weights'])}\n\n![what is kept](structure.png)\n"
    if "survey" in found:
        text += (
            f"\nShare of lines that are next to nothing after group lasso on all lines:\n\n{_survey(found['survey'])}\n"
        )
    return text


_STAGES = ("before", "projected", "after")


def _kind_of(name: str) -> str:
    """A weight's name without its place in depth."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _by_kind(weights: dict[str, dict[str, Any]]) -> str:
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, row in weights.items():
        for key in ("entries", "nonzero", "values", "index", "scales"):
            sums[_kind_of(name)][key] += row[key]
    rows = []
    for kind, row in sums.items():
        bits = (row["values"] + row["index"] + row["scales"]) / row["entries"]
        rows.append([kind, row["entries"], percent(row["nonzero"] / row["entries"]), f"{bits:.2f}"])
    return table(["weights", "entries", "not zero", "bits an entry, all included"], rows, "md")


def _survey(found: dict[str, tuple[float, float]]) -> str:
    rows = [[name, percent(outputs), percent(inputs)] for name, (outputs, inputs) in found.items()]
    return table(["weight", "outputs", "inputs"], rows, "md")
