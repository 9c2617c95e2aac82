"""``sidt push``: a result on the hub."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private; one that is public is refused.")
def push(run: Path, repository: str, private: bool) -> None:
    """Put the result of a RUN, or a checkpoint folder, on the Hugging Face hub, with a model card."""
    from sidt.runs import card

    click.echo(card.push(run, repository, private=private))
