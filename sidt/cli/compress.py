"""``sidt compress``: structure inside the weights of a run's model."""

from pathlib import Path

import click

from sidt.cli.detect import detection, names_a_detector
from sidt.cli.options import DEVICE


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--config", required=True, type=click.Path(path_type=Path), help="YAML: structures, how to reach them, and more."
)
@click.option("--dense", is_flag=True, help="Compress the dense model, not the run's result.")
@DEVICE
def compress(run: Path, config: Path, dense: bool, device: str | None) -> None:
    """Restrict what is in the weights of a RUN's model: tiles, lanes, patterns, levels, ternary.

    RUN is of `sidt search` or of `sidt detect`. Writes RUN/compressed/NAME of the config: the packed model (sidt.load,
    or load_detector, reads it), its numbers and a report. Stop it with Ctrl-C; the same command goes on.
    """
    from sidt.runs.alone import working_in

    if names_a_detector(str(run)):
        with working_in(run):
            opened = detection("runs.folder").open_run(run, settings={"device": device})
            click.echo(detection("runs.compressing").compress(opened, config, dense=dense, say=click.echo))
        return
    import json

    from sidt.runs.compressed import compress as compress_run
    from sidt.runs.folder import folder_for, open_run
    from sidt.runs.images import naming_broken

    with working_in(folder_for(run, None)):
        opened = open_run(run, None, (), () if device is None else (f"device={json.dumps(device)}",))
        with naming_broken(opened):
            click.echo(compress_run(opened, config, dense=dense, say=click.echo))
