"""What is left of a compressed model, in numbers and as a report: of a classifier or of a detector."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidt.cost.clock import processor, time_in_turn
from sidt.files import write_json, write_text
from sidt.hardware.crossbars import CrossbarDevice, count_crossbars
from sidt.hardware.device import Rows, read_device
from sidt.hardware.fpga import FpgaDevice, count_cycles
from sidt.report.plots import plot_structures, plot_survey
from sidt.report.tables import table
from sidt.report.text import percent
from sidt.sparsity.config import CompressConfig
from sidt.sparsity.convolution import time_convolutions
from sidt.sparsity.engines import OnGpu, block_sparse, semi_structured
from sidt.sparsity.structures import Structure

RESULT, REPORT, PICTURE, SURVEY = "compressed.json", "report.md", "structure.png", "survey.png"
STAGES = ("before", "cut", "projected", "after")


def weights_kept(model: nn.Module, structures: Mapping[str, Structure]) -> dict[str, dict[str, Any]]:
    """What is left of each weight that has a structure, and its bits."""
    found = {}
    for name, structure in structures.items():
        weight = model.get_parameter(name).detach()
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


def devices_of(config: CompressConfig, folder: Path) -> tuple[FpgaDevice | None, CrossbarDevice | None]:
    """The devices that a config names, whose files are in a folder.

    Raises:
        InputError: a file cannot be used.
    """
    return (
        None if config.fpga is None else read_device(FpgaDevice, folder / config.fpga),
        None if config.crossbar is None else read_device(CrossbarDevice, folder / config.crossbar),
    )


def modelled(
    model: nn.Module, positions: Mapping[str, Rows], config: CompressConfig, folder: Path
) -> dict[str, list[int]]:
    """Cycles and crossbars of a model without its zeros and with them, where the config names a device.

    Args:
        model: the compressed one.
        positions: of its layers, ``space.trace.positions``.
        config: names the devices.
        folder: of the config, where they are.
    """
    found: dict[str, list[int]] = {}
    fpga, crossbar = devices_of(config, folder)
    if fpga is not None:
        cycles = count_cycles(model, positions, fpga)
        found["cycles"] = [sum(c.dense_cycles for c in cycles), sum(c.cycles for c in cycles)]
    if crossbar is not None:
        counts = count_crossbars(model, positions, crossbar)
        found["crossbars"] = [sum(c.dense_crossbars for c in counts), sum(c.crossbars for c in counts)]
    return found


def latency(
    model: nn.Module, structures: Mapping[str, Structure], config: CompressConfig, forward: Callable[[nn.Module], Any]
) -> dict[str, float]:
    """Milliseconds of one image by the config's engine and without it, in turn; 2:4 on the GPU, in half precision."""
    if config.engine == "patterns":
        return time_convolutions(model, structures, forward)
    if config.engine == "block-sparse":
        twin = block_sparse(model, structures)
    elif config.engine == "2:4":
        model, twin = OnGpu(model), semi_structured(model, structures)
    else:
        return {}
    with torch.inference_mode():
        return time_in_turn({"dense": lambda: forward(model), config.engine: lambda: forward(twin)})


def write_report(
    found: dict[str, Any], judged: str, model: nn.Module, structures: Mapping[str, Structure], folder: Path
) -> str:
    """Write the numbers of a compression, its picture and its report, and give the report.

    Args:
        found: the numbers.
        judged: the table of the quality of each stage.
        model: the compressed model.
        structures: of its weights.
        folder: where to; its name is the report's.
    """
    write_json(folder / RESULT, found)
    if structures:
        plot_structures({n: model.get_parameter(n).detach() for n in structures}, folder / PICTURE)
    if "survey" in found:
        plot_survey(_by_depth(found["survey"]), folder / SURVEY)
    text = report(found, folder.name, judged)
    write_text(folder / REPORT, text)
    return f"{text}\n-> {folder}"


def report(found: Mapping[str, Any], name: str, judged: str) -> str:
    """The report of a compression, as Markdown."""
    ratio = found["dense_bytes"] / found["bytes"]
    text = f"# {name}\n\n{judged}\n\n"
    text += f"{found['bytes']:,} bytes, {ratio:.1f} times smaller than the dense file's {found['dense_bytes']:,}. "
    text += f"{found['params']:,} of {found['params_before']:,} parameters are in the model.\n\n"
    for what, (whole, left) in found["modelled"].items():
        text += f"{what.capitalize()} (modelled): {left:,} of {whole:,}, {left / max(whole, 1):.1%}.\n\n"
    if found["latency_ms"]:
        times = ", ".join(f"{how} {ms:.2f} ms" for how, ms in found["latency_ms"].items())
        text += f"One image: {times}; {processor()}, torch threads: {torch.get_num_threads()}.\n\n"
    if found["weights"]:
        text += f"{_by_kind(found['weights'])}\n\n![what is kept]({PICTURE})\n"
    if "survey" in found:
        text += "\nShare of lines that are next to nothing after group lasso on all of them:\n\n"
        text += f"{_survey(found['survey'])}\n\n![lines that are next to nothing]({SURVEY})\n"
    return text


def _kind_of(name: str) -> str:
    """A weight's name without its place in depth."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _by_kind(weights: Mapping[str, Mapping[str, Any]]) -> str:
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, row in weights.items():
        for key in ("entries", "nonzero", "values", "index", "scales"):
            sums[_kind_of(name)][key] += row[key]
    rows = []
    for kind, row in sums.items():
        bits = (row["values"] + row["index"] + row["scales"]) / row["entries"]
        rows.append([kind, row["entries"], percent(row["nonzero"] / row["entries"]), f"{bits:.2f}"])
    return table(["weights", "entries", "not zero", "bits an entry, all included"], rows, "md")


def _survey(found: Mapping[str, tuple[float, float]]) -> str:
    rows = [[name, percent(outputs), percent(inputs)] for name, (outputs, inputs) in found.items()]
    return table(["weight", "outputs", "inputs"], rows, "md")


def _by_depth(found: Mapping[str, tuple[float, float]]) -> dict[str, list[float]]:
    """The shares of each kind of weight and orientation, in order of depth."""
    rows: dict[str, list[float]] = defaultdict(list)
    for name, shares in found.items():
        for what, share in zip(("outputs", "inputs"), shares, strict=True):
            rows[f"{_kind_of(name).removesuffix('.weight')}, {what}"].append(share)
    return rows
