"""ONNX files by torch's exporter, compared by ONNX Runtime with the model before anything is written."""

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sidt.errors import InputError
from sidt.export.agreement import Exported, compared, example, outputs_of, ready, refuse_beyond
from sidt.files import check_file, write_bytes
from sidt.space.trace import InputSize

Precision = Literal["float32", "fp16", "int8"]

# Largest difference from the model, relative to the output's scale. Seen on the backbones of the tests: float32 2e-6.
BOUNDS: dict[Precision, float] = {"float32": 1e-4, "fp16": 2e-2, "int8": 0.25}
_OLDEST = 18  # what torch's exporter writes; older ones it only converts to, and seldom can
_LARGEST = 2**31 - 2**24  # bytes in one protobuf, with room for the graph


def to_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: InputSize | None = None,
    dynamic_batch: bool = False,
    opset: int | None = None,
    precision: Precision = "float32",
) -> Exported:
    """Write a model, dense or sliced, as one ONNX file. Its input is ``images``, float32 in any precision.

    Args:
        model: gives a tensor (``output``) or several (``output0``, ``output1``, ...). It is not changed.
        path: the file; it is written only if ONNX Runtime computes with it what the model computes.
        input_size: channels, height, width of an image; default: what the model was built for.
        dynamic_batch: whether the file takes batches of any size; else it takes one image.
        opset: the version of ONNX's operators; default: torch's.
        precision: ``fp16`` for half the bytes (inputs and outputs stay float32), ``int8`` for linear layers with
            weights of 8 bits, whose inputs are quantised as they come.

    Raises:
        InputError: an argument is wrong, ONNX is not installed, the model cannot be exported, the outputs differ by
            more than ``BOUNDS``, or the file cannot be written.
    """
    check_file(Path(path))
    exported = as_onnx(model, input_size, dynamic_batch=dynamic_batch, opset=opset, precision=precision)
    refuse_beyond(exported, BOUNDS[precision], f"{precision} export")
    write_bytes(Path(path), exported.data)
    return exported


def as_onnx(
    model: nn.Module, input_size: InputSize | None, *, dynamic_batch: bool, opset: int | None, precision: Precision
) -> Exported:
    """What :func:`to_onnx` writes, whatever its outputs are."""
    if precision not in BOUNDS:
        raise InputError(f"precision is {precision!r}; use one of {', '.join(BOUNDS)}")
    onnx = _needed()
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not _OLDEST <= opset <= newest:
        raise InputError(f"opset {opset} cannot be written; use {_OLDEST} to {newest}, or leave it out")
    model = ready(model)
    if (size := sum(p.nbytes for p in model.state_dict().values())) > _LARGEST:
        raise InputError(f"one ONNX file holds 2 GB, and the weights have {size / 1e9:.1f} GB; export with --to torch")
    images = example(model, input_size, dynamic_batch=dynamic_batch)
    with _quiet():
        proto = _graph(model, images, dynamic_batch, opset)
        if precision == "fp16":
            proto = _half(proto)
        elif precision == "int8":
            proto = _quantised(proto)
        data = proto.SerializeToString()
    session = _session(data, opset)

    def run(batch: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(found) for found in _called(session.run, None, {"images": batch.numpy()})]

    return compared(model, data, run, images, dynamic_batch=dynamic_batch)


class _NoEmptyLayers(TorchFunctionMode):
    """Linear layers that read no features (there are no heads, or no units) become their bias.

    ONNX Runtime up to 1.30 fuses products over nothing into what it then cannot run.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in place of each function of torch."""
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        return _linear(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.shape[1]:
        return F.linear(input, weight, bias)
    rows = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return rows.expand(*input.shape[:-1], -1)


def _graph(model: nn.Module, images: Tensor, dynamic_batch: bool, opset: int | None) -> Any:
    """The model as torch's exporter writes it, without the traces of the machine that it was written on."""
    outputs = outputs_of(model, images)
    names = ["output"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
    try:
        with _NoEmptyLayers():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["images"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"torch cannot export this {type(model).__name__} to ONNX: {reason}") from None
    assert program is not None
    proto = program.model_proto
    written = {entry.domain: entry.version for entry in proto.opset_import}[""]
    if opset not in (None, written):
        raise InputError(f"opset {opset} cannot be written for this model, only {written}; leave it out")
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.initializer, *proto.graph.output):
        part.ClearField("metadata_props")  # stack traces, with the paths of whoever exports
    return proto


def _half(proto: Any) -> Any:
    """Weights and arithmetic in float16, inputs and outputs in float32."""
    return import_module("onnxruntime.transformers.float16").convert_float_to_float16(proto, keep_io_types=True)


def _quantised(proto: Any) -> Any:
    """Linear layers with weights of 8 bits, by channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto.graph.ClearField("value_info")  # it is inferred again: the quantiser transposes weights that it has shapes of
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(
            proto,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],  # convolutions would get slower
            per_channel=True,
            reduce_range=True,  # 7 bits: older processors overflow in the sum of two products of 8
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)


def _session(data: bytes, opset: int | None) -> Any:
    """ONNX Runtime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        return _called(onnxruntime.InferenceSession, data, options, providers=["CPUExecutionProvider"])
    except RuntimeError as error:
        fix = f"; opset {opset} may be too new: leave it out" if opset else ""
        raise InputError(
            f"ONNX Runtime does not take the exported model, so nothing is written: {str(error)[:200]}{fix}"
        ) from None


def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of ONNX Runtime with RuntimeError in place of its own errors, which have no class in common."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise RuntimeError(" ".join(str(error).split())) from None


def _needed() -> Any:
    """The package onnx, once all three are there.

    Raises:
        InputError: one is not installed; the message says the command that installs it.
    """
    try:
        return [import_module(name) for name in ("onnxscript", "onnxruntime", "onnx")][-1]
    except ModuleNotFoundError as error:
        raise InputError(
            f"export to ONNX needs {error.name}, which is not installed; install it with `uv sync --extra onnx` in the "
            f"repository, or `uv pip install 'sidt[onnx]'`"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and quantiser tell their progress, and what they try in vain."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
