"""``sidt export``: a model leaves as a file. Imports happen inside the command, so that help is quick."""

from pathlib import Path
from typing import Any

import click

from sidt.cli.detect import detection, names_a_detector
from sidt.cli.options import image_size
from sidt.errors import InputError


@click.command()
@click.argument("source", metavar="RUN|CHECKPOINT|MODEL")
@click.option(
    "--to",
    type=click.Choice(["onnx", "torch", "timm"]),
    default="onnx",
    show_default=True,
    help="torch: a .pt2 file; timm: a folder that timm reads by itself, of uniform sizes.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The file or folder; default: model.onnx in the folder.")
@click.option("--dynamic-batch", is_flag=True, help="Take batches of any size, and not one image.")
@click.option("--opset", type=int, help="Version of ONNX's operators; default: torch's.")
@click.option("--fp16", is_flag=True, help="Weights and arithmetic in float16.")
@click.option("--int8", is_flag=True, help="Linear layers in int8, quantised as images come.")
@click.option("--input", "input_size", metavar="3x224x224", help="Image size; default: the source's own.")
@click.option("--random-weights", is_flag=True, help="A timm MODEL without its published weights, to try things out.")
@click.option("--part", type=click.Choice(["backbone", "detector"]), help="Of a detector; default: backbone.")
def export(
    source: str,
    out: Path | None,
    input_size: str | None,
    random_weights: bool,
    part: Any,
    **options: Any,
) -> None:
    """Write a model as an ONNX or torch.export file, and compare it with the model and with the dense one.

    A RUN gives its fine-tuned model, else its sliced one; a run of ``sidt detect`` the backbone's maps, or what the
    heads of the whole detector give. Nothing is written unless the file computes what the model computes.
    """
    from sidt.runs.exports import ExportOptions, export_source, export_to_timm

    if options["to"] == "timm":
        given = [name for name in ("dynamic_batch", "opset", "fp16", "int8") if options[name]]
        if given or input_size or random_weights or part:
            raise InputError("--to timm takes --out alone: it writes the model's weights as they are")
        click.echo(export_to_timm(source, out))
        return
    checked, size = ExportOptions(**options), image_size(input_size)
    if names_a_detector(source):
        if random_weights:
            raise InputError(f"--random-weights is for timm models; {source} is a detector")
        click.echo(detection("runs.export").export_detector(source, out, checked, size, part or "backbone"))
        return
    if part is not None:
        raise InputError(f"--part {part} is for detectors; {source} is none")
    click.echo(export_source(source, out, checked, size, random_weights=random_weights))
