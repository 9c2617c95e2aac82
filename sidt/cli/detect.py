"""``sidt detect``: the command line of detection. Imports happen inside commands, so that help is quick."""

from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from sidt.cli.options import DEVICE, OUT, SOURCE, TRIALS, budgeted, image_size, key_values, number, together
from sidt.errors import InputError

_OPTIONS = click.option(
    "--cfg-options",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a value of the MMDetection config, e.g. train_cfg.max_epochs=3. Repeatable.",
)
_DATA = click.option(
    "--data-root", type=click.Path(path_type=Path), help="The folder of the data, in place of the config's data_root."
)
_LAUNCHER = click.option(
    "--launcher", type=click.Choice(["none", "pytorch", "slurm", "mpi"]), default="none", help="As MMDetection's."
)
_AMP = click.option("--amp", is_flag=True, help="Automatic mixed precision.")
_HOLDOUT = click.option(
    "--holdout", metavar="X", help="Training images held out for the search: a fraction or a number."
)


_INPUT = click.option("--input", "input_size", metavar="3x800x1280", help="Image size that costs are stated at.")
_RUN = together(SOURCE, OUT, _DATA, _OPTIONS)  # the arguments of every command that takes a config


@click.group()
def detect() -> None:
    """Prune, train and evaluate detectors of MMDetection."""


def names_a_detector(source: str) -> bool:
    """Whether a source is an MMDetection config, a run of ``sidt detect``, or a detector's folder."""
    path = Path(source)
    return path.suffix == ".py" or any((path / name / "config.py").is_file() for name in ("", "dense"))


def detection(module: str) -> Any:
    """A module of ``sidt.detection``.

    Raises:
        InputError: the detection extra is not installed; the message says the command that installs it.
    """
    import io
    import warnings
    from contextlib import redirect_stdout

    try:
        # MMDetection tells what optional packages it has not found.
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(f"sidt.detection.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("mmdet", "mmcv", "mmengine", "pycocotools"):
            raise
        raise InputError(
            f"detection needs {error.name}, which is not installed; install it with `uv sync --extra detection` in "
            f"the repository, or `uv pip install 'sidt[detection]'`"
        ) from None


def _parsed(options: tuple[str, ...]) -> dict[str, Any]:
    return key_values("--cfg-options", options, "train_cfg.max_epochs=3")


def _mixed_precision(options: dict[str, Any], amp: bool) -> dict[str, Any]:
    """The options of MMDetection's ``--amp``."""
    return (
        options | {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.loss_scale": "dynamic"} if amp else options
    )


def _open(
    source: Path,
    out: Path | None,
    data_root: Path | None,
    options: tuple[str, ...],
    settings: dict[str, Any],
) -> Any:
    return detection("runs.folder").open_run(source, out, _parsed(options), settings, data_root=data_root)


def _working(source: Path, out: Path | None, *, together: bool = False) -> AbstractContextManager[None]:
    """While the block runs, no other command works in the run folder; see :func:`sidt.runs.alone.working_in`."""
    from sidt.runs.alone import working_in

    return working_in(detection("runs.folder").folder_for(source, out), together=together)


@detect.command()
@_RUN
@_HOLDOUT
@_AMP
@_LAUNCHER
def train(source: Path, holdout: str | None, amp: bool, launcher: str, **arguments: Any) -> None:
    """Train the dense detector with MMEngine's Runner; the same command goes on after a stop."""
    pipeline = detection("runs.pipeline")
    if source.is_dir():
        raise InputError(f"{source} is a folder; training starts from a config (.py), with --out {source}")
    with _working(source, arguments["out"]):
        run = _open(source, settings={"holdout": number(holdout)}, **arguments)
        click.echo(pipeline.train_dense(run, _mixed_precision({}, amp), launcher=launcher))


@detect.command()
@_RUN
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights of the trained detector: MMDetection's .pth, or safetensors.",
)
@budgeted
@click.option(
    "--on",
    type=click.Choice(["backbone", "detector"]),
    help="What the budget is of; default: backbone. Of the detector, the channels of neck and heads are searched too.",
)
@click.option("--score", type=click.Choice(["taylor", "fisher", "magnitude", "random"]), help="The importance.")
@click.option("--score-images", type=int, help="Training images that the importance is measured on.")
@click.option("--objective", type=click.Choice(["ap", "loss"]), help="What trials are judged by on held-out images.")
@_HOLDOUT
@click.option(
    "--kinds",
    help="Kinds of dimensions to search, e.g. heads,qk,v,mlp,width; default: all, the width where it can be rotated.",
)
@click.option("--round-to", type=int, help="Sizes become multiples of this.")
@_INPUT
@TRIALS
@DEVICE
def search(
    source: Path,
    out: Path | None,
    data_root: Path | None,
    options: tuple[str, ...],
    checkpoint: Path | None,
    holdout: str | None,
    kinds: str | None,
    input_size: str | None,
    **settings: Any,
) -> None:
    """Score the backbone by the detector's own loss, search its dimensions within the budget, slice the detector.

    Stop it with Ctrl-C; the same command goes on.
    """
    pipeline = detection("runs.pipeline")
    given = {
        **settings,
        "holdout": number(holdout),
        "kinds": kinds.split(",") if kinds else None,
        "input_size": image_size(input_size),
    }
    with _working(source, out, together=checkpoint is None):
        run = _open(source, out, data_root, options, given)
        if checkpoint is not None:
            click.echo(pipeline.take_checkpoint(run, checkpoint))
        click.echo(pipeline.search(run, click.echo))


@detect.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="RUN")
@_DATA
@_OPTIONS
@_AMP
@click.option("--teacher", is_flag=True, help="Learn from the dense detector too, as the config's sidt.teacher says.")
@_LAUNCHER
def finetune(
    source: Path, data_root: Path | None, options: tuple[str, ...], amp: bool, teacher: bool, launcher: str
) -> None:
    """Train the sliced detector further with MMEngine's Runner; the same command goes on after a stop."""
    pipeline = detection("runs.pipeline")
    with _working(source, None):
        run = _open(source, None, data_root, (), {})
        changes = _mixed_precision(_parsed(options), amp)
        click.echo(pipeline.finetune(run, changes, launcher=launcher, teacher=teacher))


@detect.command()
@_RUN
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Weights for a CONFIG; they become its dense detector."
)
@click.option("--per-class", is_flag=True, help="Also the AP of each class.")
@click.option("--draw", type=int, default=0, help="Draw the boxes of this many test images, detectors side by side.")
@click.option("--no-latency", is_flag=True, help="Do not time the detectors.")
@_INPUT
@click.option(
    "--format", "style", type=click.Choice(["table", "md", "csv", "latex"]), default="table", show_default=True
)
@_LAUNCHER
def evaluate(
    checkpoint: Path | None,
    per_class: bool,
    draw: int,
    no_latency: bool,
    input_size: str | None,
    style: Any,
    launcher: str,
    **arguments: Any,
) -> None:
    """COCO scores, parameters, MACs and latency of a run's detectors, as a table and in evaluation.json."""
    pipeline = detection("runs.pipeline")
    with _working(arguments["source"], arguments["out"]):
        run = _open(**arguments, settings={"input_size": image_size(input_size)})
        if checkpoint is not None:
            click.echo(pipeline.take_checkpoint(run, checkpoint, only_test=True))
        table = pipeline.evaluate(run, launcher=launcher, per_class=per_class, latency=not no_latency, style=style)
        click.echo(table)
        if draw:
            click.echo(pipeline.draw(run, draw))


@detect.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="RUN")
@_DATA
@_OPTIONS
def report(source: Path, data_root: Path | None, options: tuple[str, ...]) -> None:
    """Write report.html: scores, kept sizes, the search, boxes side by side."""
    page = detection("runs.page")
    with _working(source, None):
        click.echo(f"report -> {page.write_page(_open(source, None, data_root, options, {}))}")


@detect.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", type=int, default=None, help="Training images.")
@click.option("--val", type=int, default=None, help="Test images.")
@click.option("--size", type=int, default=None, help="Side of the images in pixels.")
@click.option("--seed", type=int, default=0, show_default=True)
def digits(folder: Path, seed: int, **numbers: int | None) -> None:
    """Write the digits detection set to FOLDER, in COCO format."""
    given = {name: value for name, value in numbers.items() if value is not None}
    click.echo(detection("data.digits").write_digits(folder, seed=seed, **given))


@detect.command()
@OUT
@_OPTIONS
@DEVICE
def demo(out: Path | None, options: tuple[str, ...], device: str | None) -> None:
    """The whole way on handwritten digits, with nothing to download: a detector with a 40 % smaller backbone."""
    from sidt.runs.alone import working_in

    folder = out or Path("runs") / "detect-demo"
    with working_in(folder):
        detection("runs.demo").demo(folder, _parsed(options), device, click.echo)
