"""What the commands share: options, and how numbers and sizes are read."""

from pathlib import Path

import click

from sidt.errors import InputError

SOURCE = click.argument("source", type=click.Path(path_type=Path), metavar="CONFIG|RUN")
OUT = click.option("--out", type=click.Path(path_type=Path), help="Run folder; default: runs/<name of the config>.")
DEVICE = click.option("--device", help="auto, cpu, mps, cuda or cuda:N.")


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
