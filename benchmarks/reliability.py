"""What SiDT does with changed files, with kills, with disks that are full, and with two commands at once.

    python benchmarks/reliability.py [--parts mutations,kills,adversity] [--mutations 1000] [--kills 100]

All of it is on handwritten digits, with models that train in seconds, made first in ``--folder``. What a part found is
kept there too, so that parts may be run one by one; the results file has all that were.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from adversity import adversity_text, run_adversity
from kills import kills_text, run_kills
from mutations import mutations_text, run_mutations
from results import environment, write_results
from small_runs import Runs, made

from sidt.files import read_json, write_json

HERE = Path(__file__).parent
PARTS = ("mutations", "kills", "adversity")


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--mutations", default=1000, show_default=True, help="Changed files in all.")
@click.option(
    "--only",
    help="Of the mutations one KIND, whose row is put in place of its earlier one; or KIND/NUMBER, to look at.",
)
@click.option("--kills", default=100, show_default=True, help="Kills in all.")
@click.option("--minutes", default=60.0, show_default=True, help="After which no more kills begin.")
@click.option("--seed", default=0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/reliability"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "reliability", show_default=True)
def main(
    parts: str,
    mutations: int,
    only: str | None,
    kills: int,
    minutes: float,
    seed: int,
    folder: Path,
    out: Path,
) -> None:
    """Run the parts, and write what they found."""
    wanted = [part for part in parts.split(",") if part]
    if unknown := set(wanted) - set(PARTS):
        raise click.UsageError(f"--parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    runs = made(folder.resolve())
    if only is not None:
        rows = run_mutations(runs, mutations, seed, only)
        if "/" in only:
            return
        earlier = read_json(folder / "mutations.json")
        known = {row["kind"]: row for row in [*earlier["found"], *rows]}
        write_json(folder / "mutations.json", {**earlier, "found": list(known.values())})
        wanted = []
    work: dict[str, Callable[[Runs], Any]] = {
        "kills": lambda runs: [run_kills(runs, kills, minutes, seed)],
        "adversity": run_adversity,
        "mutations": lambda runs: [run_mutations(runs, mutations, seed)],  # last: it bounds this process's memory
    }
    for part, do in work.items():
        for found_so_far in do(runs) if part in wanted else ():
            write_json(folder / f"{part}.json", {"environment": environment(), "found": found_so_far})
    found = {part: read_json(path) for part in PARTS if (path := folder / f"{part}.json").is_file()}
    says = {"mutations": mutations_text, "kills": kills_text, "adversity": adversity_text}
    text = "\n\n".join(says[part](found[part]["found"]) for part in found)
    write_results(out, "What goes wrong, and what then happens", environment(), text, found)


if __name__ == "__main__":
    main()
