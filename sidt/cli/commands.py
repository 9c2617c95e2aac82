"""The command line: arguments in, functions called, text out. Imports happen inside commands, so that help is quick."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidt.cli.compress import compress
from sidt.cli.detect import detect, detection, names_a_detector
from sidt.cli.export import export
from sidt.cli.options import DEVICE, OUT, SET, SOURCE, SPACE, TRIALS, budgeted, everywhere, image_size, together
from sidt.cli.partition import partition
from sidt.cli.share import push
from sidt.cli.shrink import shrink
from sidt.errors import InputError

if TYPE_CHECKING:
    from sidt.runs.folder import Run

LONGEST = 800  # characters of a message


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sidt")
def cli() -> None:
    """Make vision transformers smaller by searching their dimensions."""


cli.add_command(compress)
cli.add_command(detect)
cli.add_command(export)
cli.add_command(partition)
cli.add_command(push)
cli.add_command(shrink)


_STEP = together(SOURCE, OUT, SET, DEVICE)  # the arguments that every step of a run has


def _open(
    source: Path,
    out: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
    values: Mapping[str, Any] | None = None,
    once: Mapping[str, Any] | None = None,
) -> "Run":
    """The run that a step works on; options that were given replace values of its config, some for this call alone."""
    import json

    from sidt.runs.folder import open_run

    def texts(given: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)

    return open_run(source, out, (*overrides, *texts(values or {})), texts({**(once or {}), "device": device}))


def _working(source: Path, out: Path | None, *, together: bool = False, **_: Any) -> AbstractContextManager[None]:
    """While the block runs, no other command works in the run folder; see :func:`sidt.runs.alone.working_in`."""
    from sidt.runs.alone import working_in
    from sidt.runs.folder import folder_for

    return working_in(folder_for(source, out), together=together)


def _do(step: Callable[["Run"], str], run: "Run") -> None:
    """Do one step, say what it did, and keep the config that it was done with."""
    from sidt.runs.folder import remember
    from sidt.runs.images import naming_broken

    with naming_broken(run):
        click.echo(step(run))
    remember(run)


def _add_step(name: str, module: str, function: str, says: str) -> None:
    """A command that does one step of a run and has no options of its own."""

    @cli.command(name, help=says)
    @_STEP
    def step(**arguments: Any) -> None:
        from importlib import import_module

        with _working(**arguments):
            _do(getattr(import_module(f"sidt.runs.{module}"), function), _open(**arguments))


_add_step("train", "pipeline", "train", "Train the dense model, or take the weights that the config names.")
_add_step("score", "pipeline", "score", "Score the importance of every unit; with steps, slice on the way.")
_add_step(
    "evaluate", "outcome", "evaluate", "Top-1 on the test split, parameters, MACs and latency of the run's models."
)
_add_step("report", "outcome", "write_report", "Write report.md with its plots, and report.html.")


@cli.command()
@_STEP
@budgeted
@TRIALS
@click.option("--pareto", is_flag=True, default=None, help="The curve over all budgets, not the budget's alone.")
def search(
    budget: dict[str, Any] | None,
    trials: int | None,
    timeout: float | None,
    seed: int | None,
    storage: str | None,
    workers: int | None,
    pareto: bool | None,
    **arguments: Any,
) -> None:
    """Search the plan within the budget. Stop it with Ctrl-C; the same command goes on."""
    from sidt.runs import pipeline

    values = {"budget": budget, "search.pareto": pareto, "seed": seed}
    once = {"search.trials": trials, "search.timeout": timeout, "search.storage": storage}
    once["search.workers"] = workers
    with _working(**arguments, together=True):
        _do(lambda run: pipeline.search(run, click.echo), _open(**arguments, values=values, once=once))


@cli.command("slice")
@_STEP
@click.option(
    "--at", type=float, metavar="SHARE", help="Take this point of the curve that `search --pareto` found: 0.4."
)
def slice_(at: float | None, **arguments: Any) -> None:
    """Slice the dense model by the plan."""
    from sidt.runs import pipeline

    with _working(**arguments):
        _do(lambda run: pipeline.slice_(run, at, click.echo), _open(**arguments))


@cli.command()
@_STEP
@click.option("--teacher", is_flag=True, help="Learn from the dense model too, as the config's section teacher says.")
def finetune(teacher: bool, **arguments: Any) -> None:
    """Train the sliced model further."""
    from sidt.runs import pipeline

    with _working(**arguments):
        run = _open(**arguments)
        if teacher and run.config.teacher is None:
            run = _open(**arguments, values={"teacher": {}})
        _do(pipeline.finetune, run)


@cli.command()
@_STEP
@budgeted
def run(budget: dict[str, Any] | None, **arguments: Any) -> None:
    """All steps: train, score, search, slice, finetune, evaluate, report."""
    from sidt.runs import pipeline
    from sidt.runs.images import naming_broken

    with _working(**arguments):
        opened = _open(**arguments, values={"budget": budget})
        with naming_broken(opened):
            pipeline.run_all(opened, click.echo)


@cli.command()
@OUT
@SET
@DEVICE
def demo(**arguments: Any) -> None:
    """The whole way on handwritten digits, with nothing to download: to a fiftieth of the parameters."""
    from importlib import resources

    from sidt.runs import pipeline

    with resources.as_file(resources.files("sidt.configs") / "classification" / "digits_vit.yaml") as config:
        arguments["out"] = arguments["out"] or Path("runs") / "demo"
        with _working(config, **arguments):
            opened = _open(source=config, **arguments)
            pipeline.run_all(opened, click.echo)
    click.echo((opened.folder / "report.md").read_text(encoding="utf-8"))


@cli.command()
def env() -> None:
    """Versions and machine, for a bug report."""
    from sidt.report.environment import environment_rows
    from sidt.report.tables import table

    click.echo(table(["", "here"], environment_rows()))


def _absent(name: str) -> str:
    package = name.partition(".")[0]
    return "" if package in sys.modules or find_spec(package) else f" (there is no package {package} here)"


@cli.command()
@click.argument("model", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Check this search-space file on the MODEL.")
@click.option("--draft", type=click.Path(path_type=Path), help="Draft a search-space file for the MODEL, and check it.")
@click.option("--input", "input_size", metavar="3x224x224", help="Image size of the check; default: the MODEL's own.")
def spaces(model: str | None, file: Path | None, draft: Path | None, input_size: str | None) -> None:
    """List the families of backbones, or print the dimensions of a timm MODEL.

    With --file or --draft, MODEL may also be module:function, whose function without arguments builds it.
    """
    if draft is not None:
        if model is None or file is not None:
            raise InputError(f"a search space is drafted from a model alone: sidt spaces MODEL --draft {draft}")
        from sidt.runs.drafting import draft_file

        click.echo(draft_file(model, draft, image_size(input_size)))
        return
    if model is None:
        if file is not None:
            raise InputError(f"a search space is checked on a model: sidt spaces MODEL --file {file}")
        from sidt.report.tables import table
        from sidt.space.finding import families, own_families

        rows = [
            [f.file.stem if f in families() else str(f.file), n, ", ".join(f.kinds) + _absent(n)]
            for f in [*own_families(), *families()]
            for n in f.models
        ]
        click.echo(table(["search space", "model class", "may be searched"], rows))
        return
    if file is not None:
        from sidt.runs.checking import check_file

        click.echo(check_file(model, file, image_size(input_size)))
        return
    from sidt.cost.complexity import shares
    from sidt.report.text import dimensions_table
    from sidt.runs.sources import space_of

    space = space_of(model, image_size(input_size))
    click.echo(dimensions_table(space, shares(space)))


@cli.command()
@click.argument("source", metavar="MODEL|RUN|CONFIG")
@click.option("--plan", type=click.Path(path_type=Path), help="A plan.json: dense beside sliced.")
@click.option(
    "--input",
    "input_size",
    metavar="3x224x224",
    help="Channels x height x width, which a timm MODEL is built for; default: its own.",
)
@click.option("--by", type=click.Choice(["module", "block", "kind"]), help="Rows of a backbone; default: block.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "md", "csv", "latex", "json"]),
    default="table",
    show_default=True,
)
@click.option("--latency", is_flag=True, help="Time each layer here, dense and sliced, and say which do not pay.")
def complexity(source: str, plan: Path | None, input_size: str | None, by: Any, style: Any, latency: bool) -> None:
    """Parameters and multiply-adds of a timm MODEL, a RUN folder (with its plan), or a CONFIG's model.

    For a detector (an MMDetection config, or a run of ``sidt detect``): backbone, neck and heads, dense beside 20 %
    and 40 % fewer parameters in the backbone, or beside the plan.
    """
    size = image_size(input_size)
    if names_a_detector(source):
        if by is not None:
            raise InputError(f"--by {by} is for backbones; the table of a detector has its parts as rows")
        if latency:
            raise InputError("--latency is for backbones; `sidt detect evaluate` times detectors")
        click.echo(detection("runs.complexity").complexity_text(source, plan, size, style))
        return
    from sidt.report.text import complexity_text
    from sidt.runs.sources import complexity_of, latency_of

    if latency:
        click.echo(latency_of(source, plan, size, style))
        return
    dense, sliced = complexity_of(source, plan, size, by or "block")
    click.echo(complexity_text(dense, sliced, style))


everywhere(cli, SPACE)


def main() -> None:
    """Run the command line; what the user got wrong is one line on stderr and exit code 2."""
    try:
        cli(standalone_mode=False)
    except InputError as error:
        _fail(" ".join(str(error).split()), 2)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped; what was finished is kept, and the same command goes on from there", 130)


def _fail(message: str, code: int) -> None:
    if len(message) > LONGEST:  # which repeats a value that is one: the beginning says what it is, the end what to do
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    click.echo(f"sidt: {message}", err=True)
    sys.exit(code)
