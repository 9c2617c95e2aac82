"""What the commands share: options, and how numbers and sizes are read."""

from collections.abc import Callable
from functools import reduce, wraps
from pathlib import Path
from typing import Any

import click

from sidt.errors import InputError

Decorator = Callable[[Any], Any]


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator; help shows them in this order."""
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


SOURCE = click.argument("source", type=click.Path(path_type=Path), metavar="CONFIG|RUN")
OUT = click.option("--out", type=click.Path(path_type=Path), help="Run folder; default: runs/<name of the config>.")
DEVICE = click.option("--device", help="auto, cpu, mps, cuda or cuda:N; of this call alone.")
SPACE = click.option(
    "--space",
    multiple=True,
    expose_value=False,
    is_eager=True,
    callback=lambda _, __, files: _use_spaces(files),
    metavar="FILE",
    help="A search-space file of your own, or a folder of them. Repeatable.",
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a value of the run's config, e.g. train.epochs=3; it stays replaced. Repeatable.",
)
TRIALS = together(
    click.option("--trials", type=int, help="Finished trials in all; of this call alone."),
    click.option("--timeout", type=float, help="Seconds after which no new trial starts."),
    click.option("--workers", type=int, help="Processes that search together, each with its share of the cores."),
    click.option("--seed", type=int, help="Of Optuna's sampler and of what is drawn at random."),
    click.option(
        "--storage", help="Optuna storage URL, also postgresql+psycopg:// or journal:///; default: SQLite in the run."
    ),
)
_BOUNDS = together(
    click.option(
        "--budget.params",
        "budget_params",
        metavar="X",
        help="Parameters: a fraction (0.6 is 40 % fewer) or a number (13M).",
    ),
    click.option("--budget.macs", "budget_macs", metavar="X", help="Multiply-adds: a fraction or a number (2.5G)."),
    click.option("--budget.latency", "budget_latency", metavar="X", help="Time of one image here: a fraction or 20ms."),
)


def _use_spaces(files: tuple[str, ...]) -> None:
    from sidt.space.finding import use_spaces

    if files:
        use_spaces(*files)


def everywhere(group: click.Group, option: Decorator) -> None:
    """Give an option to all commands of a group, and of the groups in it."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            everywhere(command, option)
        else:
            option(command)


def budgeted(command: Any) -> Any:
    """The options of a budget; the command gets ``budget``, its three bounds together, or ``None`` without any.

    So a bound that the config has and the command line has not is dropped.
    """

    @wraps(command)
    def gathered(
        budget_params: str | None, budget_macs: str | None, budget_latency: str | None, **arguments: Any
    ) -> Any:
        bounds = {"params": number(budget_params), "macs": number(budget_macs), "latency": number(budget_latency)}
        given = any(bound is not None for bound in bounds.values())
        return command(budget=bounds if given else None, **arguments)

    return _BOUNDS(gathered)


def number(text: str | None) -> int | float | str | None:
    """A number as YAML would read it; other text stays text, for whoever checks the value."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def key_values(option: str, texts: tuple[str, ...], example: str) -> dict[str, Any]:
    """The values of an option that takes ``KEY=VALUE`` again and again, read as YAML.

    Raises:
        InputError: a text is not of that form.
    """
    import yaml

    from sidt.files import load_yaml

    values: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InputError(f"cannot read {option} {text!r}; write key=value, e.g. {example}")
        try:
            values[key] = load_yaml(value)
        except yaml.YAMLError:
            raise InputError(f"cannot read the value of {option} {text!r} as YAML") from None
    return values


def image_size(text: str | None) -> tuple[int, int, int] | None:
    """Channels, height and width from text such as ``3x224x224``.

    Raises:
        InputError: it is not of that form.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise InputError(f"--input is {text!r}; write channels x height x width, for example 3x224x224")
    return int(parts[0]), int(parts[1]), int(parts[2])
