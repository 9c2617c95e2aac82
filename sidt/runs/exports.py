"""``sidt export``: a model leaves as a file, with its size and latency beside those of the dense model's export."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sidt.cost.clock import processor, time_in_turn
from sidt.data.preparation import preparation_of
from sidt.errors import InputError
from sidt.export.agreement import Exported, ready, refuse_beyond, said
from sidt.export.checkpoint import load
from sidt.export.constructor import to_timm
from sidt.export.models import create_model
from sidt.export.onnx import BOUNDS, Precision, as_onnx
from sidt.export.program import BOUND, as_program
from sidt.files import check_file, write_bytes
from sidt.report.tables import table
from sidt.runs import provenance
from sidt.runs.folder import CHAIN, existing, open_run
from sidt.space.trace import InputSize, input_size_of

_SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
_RUNTIME = {"onnx": "ONNX Runtime", "torch": "exported"}


@dataclass(frozen=True)
class ExportOptions:
    """How a model leaves; see :func:`sidt.export.to_onnx` and :func:`sidt.export.to_torch`.

    Raises:
        InputError: two options exclude each other.
    """

    to: Literal["onnx", "torch"] = "onnx"
    dynamic_batch: bool = False
    opset: int | None = None
    fp16: bool = False
    int8: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.fp16 and self.int8:
            raise InputError("--fp16 and --int8 exclude each other; give one of them")
        if self.to == "torch" and (self.fp16 or self.int8 or self.opset is not None):
            raise InputError("--fp16, --int8 and --opset are for --to onnx; leave them out with --to torch")

    @property
    def precision(self) -> Precision:
        """Of the file."""
        return "fp16" if self.fp16 else "int8" if self.int8 else "float32"

    @property
    def bound(self) -> float:
        """The largest difference from the model that is let through."""
        return BOUND if self.to == "torch" else BOUNDS[self.precision]

    def file(self, folder: Path, stem: str) -> Path:
        """Where a model is written unless the user says otherwise."""
        return folder / f"{stem}{'' if self.precision == 'float32' else '-' + self.precision}{_SUFFIX[self.to]}"

    def of(self, model: nn.Module, size: InputSize) -> Exported:
        """The exported model, in memory."""
        if self.to == "torch":
            return as_program(model, size, dynamic_batch=self.dynamic_batch)
        return as_onnx(model, size, dynamic_batch=self.dynamic_batch, opset=self.opset, precision=self.precision)


def export_source(
    source: str,
    out: Path | None,
    options: ExportOptions,
    input_size: InputSize | None = None,
    *,
    random_weights: bool = False,
) -> str:
    """Export what a source names, and say what came out.

    Args:
        source: a run folder (its fine-tuned model, else its sliced one), a checkpoint folder, or a timm model, which
            gets its published weights.
        out: the file; default: ``model.onnx`` or ``model.pt2`` in the folder, or the timm model's name here.
        options: how.
        input_size: channels, height, width; default: what the run or the model was made for.
        random_weights: leave a timm model's weights as they are drawn.

    Raises:
        InputError: the source is none of these or has no model yet, or the export is refused.
    """
    path = Path(source)
    if random_weights and path.exists():
        raise InputError(f"--random-weights is for timm models; {source} has weights")
    if (path / "config.yaml").is_file():
        run, (name, folder) = open_run(path), result_of(path)
        small = load(folder)
        models = {"dense": load(path / "dense")} if (path / "dense" / "config.json").is_file() else {}
        size = (input_size_of(small)[0], *preparation_of(run.config.data).size)
        return export_models(models | {name: small}, input_size or size, out or options.file(path, "model"), options)
    if (path / "config.json").is_file():
        name, model, file = path.name or "model", load(path), options.file(path, "model")
    elif path.exists():
        raise InputError(f"{source} is no run folder and no checkpoint: it has neither config.yaml nor config.json")
    else:
        name, model = source, create_model(source, {}, pretrained=not random_weights)
        file = options.file(Path(), source.rpartition("/")[2])
    return export_models({name: model}, input_size or input_size_of(model), out or file, options)


def export_to_timm(source: str, out: Path | None) -> str:
    """Write the model of a run or checkpoint folder as one of timm's own (:func:`sidt.export.to_timm`).

    Args:
        source: a run folder (its fine-tuned model, else its sliced one), or a checkpoint folder.
        out: the folder; default: ``timm`` in it.

    Raises:
        InputError: the source is none of these or has no model yet, or timm takes none of its sizes.
    """
    path = Path(source)
    if (path / "config.yaml").is_file():
        _, folder = result_of(path)
    elif (path / "config.json").is_file():
        folder = path
    else:
        raise InputError(f"{source} is no run folder and no checkpoint: it has neither config.yaml nor config.json")
    out = out or path / "timm"
    says = to_timm(load(folder), out)
    args = ", ".join(f"{key}={value!r}" for key, value in says["model_args"].items())
    return f"timm.create_model({says['architecture']!r}, {args}) -> {out}"


def result_of(run: Path) -> tuple[str, Path]:
    """The result of a run: what it is, and its folder."""
    provenance.inputs(run, CHAIN, "evaluate")
    name, folder = ("fine-tuned", run) if (run / "config.json").is_file() else ("sliced", run / "sliced")
    return name, existing(open_run(run), str((folder / "config.json").relative_to(run)), "slice").parent


def export_models(models: Mapping[str, nn.Module], size: InputSize, file: Path, options: ExportOptions) -> str:
    """Write the last of some models to a file, and compare it with exports of the others, which are not kept.

    Args:
        models: by name.
        size: channels, height, width of an image.
        file: where to write.
        options: how.

    Returns:
        The table: bytes, milliseconds of one image and largest error of each; where the file is and what it takes.

    Raises:
        InputError: the export is refused; nothing is written then.
    """
    check_file(file)
    name = list(models)[-1]
    exports = {name: options.of(models[name], size)}
    refuse_beyond(exports[name], options.bound, f"{options.precision} export" if options.to == "onnx" else "export")
    exports = {other: options.of(model, size) for other, model in models.items() if other != name} | exports
    times = _times(models, exports, size)
    write_bytes(file, exports[name].data)
    rows: list[list[Any]] = [
        [each, len(e.data), f"{times[each, 'exported']:.2f}", f"{times[each, 'torch']:.2f}", f"{e.error:.1e}"]
        for each, e in exports.items()
    ]
    text = table(["model", "bytes", f"{_RUNTIME[options.to]} ms", "torch ms", "max error"], rows)
    batch = "any batch" if options.dynamic_batch else "one image"
    return (
        f"{text}\n\n{name}, {options.precision} -> {file}\n"
        f"It takes {batch} of {'x'.join(map(str, size))}. Its largest error is {said(exports[name])}. Latency: one "
        f"image, median of rounds in turn, torch threads: {torch.get_num_threads()}, {processor()}."
    )


def _times(
    models: Mapping[str, nn.Module], exports: Mapping[str, Exported], size: InputSize
) -> dict[tuple[str, str], float]:
    """Milliseconds of one image by each exported model and by the model itself in torch, all in turn."""
    image, calls = torch.randn(1, *size), dict[str, Callable[[], object]]()
    for name, exported in exports.items():
        model = ready(models[name])
        calls[f"{name} exported"] = lambda run=exported.run: run(image)  # type: ignore[misc]
        calls[f"{name} torch"] = lambda model=model: model(image)  # type: ignore[misc]
    with torch.inference_mode():
        found = time_in_turn(calls)
    return {(name, how): found[f"{name} {how}"] for name in exports for how in ("exported", "torch")}
