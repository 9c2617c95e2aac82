"""``sidt partition``: a model over several devices. Imports happen inside the command, so that help is quick."""

from pathlib import Path

import click

from sidt.cli.detect import names_a_detector
from sidt.errors import InputError


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="RUN|CHECKPOINT")
@click.option("--devices", required=True, type=click.Path(path_type=Path), help="A YAML file of devices.")
@click.option("--images", default=1, show_default=True, help="Images in a batch.")
@click.option("--measure", is_flag=True, help="Run the shards, a worker on this machine for each device.")
def partition(source: Path, devices: Path, images: int, measure: bool) -> None:
    """Cut a model over unequal devices, under their memory, and write the shards to SOURCE/partition.

    A RUN gives its fine-tuned model, else its sliced one. What the file does not say of a device is measured here. The
    shards are put together once, to see that they compute what the model computes.
    """
    if names_a_detector(str(source)):
        raise InputError(f"{source} is a detector; `sidt partition` cuts backbones")
    from sidt.runs.partitioning import partition_source

    click.echo(partition_source(source, devices, images=images, measured=measure))
