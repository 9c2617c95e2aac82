"""``sidt shrink``: a run from a model, a folder of images and a budget, with no config to write."""

from pathlib import Path
from typing import Any

import click

from sidt.cli.options import DEVICE, SET, budgeted, key_values
from sidt.errors import InputError


@click.command()
@click.argument("model", metavar="MODEL|RUN|FOLDER")
@click.option(
    "--images",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder of images, or of a folder for each class, or with train/ and val/ (or test/).",
)
@budgeted
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Your own weights: safetensors, or tensors of torch."
)
@click.option(
    "--model-kwargs", multiple=True, metavar="KEY=VALUE", help="For timm.create_model, as img_size=32. Repeatable."
)
@click.option(
    "--classes",
    metavar="K|NAMES",
    help="How many classes the weights are of; or the names of those that are to be left: cat,dog.",
)
@click.option("--trials", type=int, default=1, show_default=True, help="Of the search; 1 is the ranking alone.")
@click.option(
    "--steps", type=int, help="Slices on the way, each aligned and scored anew; default: as serves the budget."
)
@click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be decoded.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; default: runs/<name of the model>.")
@SET
@DEVICE
def shrink(
    model: str,
    images: Path,
    budget: dict[str, Any] | None,
    checkpoint: Path | None,
    model_kwargs: tuple[str, ...],
    classes: str | None,
    trials: int,
    steps: int | None,
    skip_broken: bool,
    out: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
) -> None:
    """Shrink a trained model to a budget on a folder of images, without training.

    MODEL is a name of timm or hf:NAME of Hugging Face (with its published weights), of the hub, a run folder (its dense
    model) or a checkpoint folder. What comes out is a run folder: `sidt finetune`, `search`, `slice`, `evaluate` and
    `report` go on from it.
    Images are prepared as the weights want it.
    """
    from sidt.runs.alone import working_in
    from sidt.runs.images import naming_broken
    from sidt.runs.shrinking import folder_for, shrink_run, shrinking_run

    if budget is None:
        raise InputError("shrink needs a budget: --budget.params 0.6, --budget.macs 0.5 or --budget.latency 20ms")
    with working_in(folder_for(model, out)):
        run = shrinking_run(
            model,
            images,
            budget,
            out=out,
            checkpoint=checkpoint,
            args=key_values("--model-kwargs", model_kwargs, "img_size=32"),
            classes=classes,
            trials=trials,
            steps=steps,
            skip_broken=skip_broken,
            overrides=overrides,
            device=device,
            say=click.echo,
        )
        with naming_broken(run):
            shrink_run(run, click.echo)
