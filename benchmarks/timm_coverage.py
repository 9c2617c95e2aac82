"""Which of timm's transformers work from end to end, and where the others stop.

    python benchmarks/timm_coverage.py [--classes VisionTransformer,Swin] [--state runs/coverage.jsonl]

Every architecture of timm that has attention is built small (two blocks, or two in each stage, and a small image,
where its class takes them), with random weights. Then: its dimension space; a random plan of 60 % of the parameters
without the widths, by which the sliced model must compute what the masked one does; and one with them, of which the
sliced model must run and have the parameters and multiply-adds that the space says. What is known of each goes to the
state at once, and the same command goes on from there; what ended the process is not tried again.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import timm
import torch
from results import environment, write_results
from torch import nn

from sidt import Budget, allocate, importance, space_for
from sidt.errors import InputError
from sidt.export.models import create_model
from sidt.report.tables import table
from sidt.runs.checking import check_counted, check_masked
from sidt.space.families import INNER_KINDS, KINDS
from sidt.space.trace import input_size_of

HERE = Path(__file__).parent
SHARE = 0.6
CLASSES = 10
LARGEST = 400_000_000  # parameters of what no argument makes smaller: larger ones are not built
STEPS = ("build", "space", "plan", "sliced is masked", "counted", "works")
# From the smallest on; the first that a class takes, and runs with, is it.
SIZES = ({"img_size": 64}, {"img_size": 56}, {"img_size": 128}, {"img_size": 112}, {})
DEPTHS: tuple[Mapping[str, Any], ...] = (
    {"depth": 2},
    *({name: (2,) * stages} for name in ("depths", "depth", "layers", "stages") for stages in (4, 3, 5, 2)),
    {},
)


def attends(model: nn.Module) -> bool:
    """Whether a module of a model has heads, beside the pooling before its classifier."""
    having = (  # Hiera calls them heads
        name
        for name, m in model.named_modules()
        if any(isinstance(getattr(m, heads, None), int) for heads in ("num_heads", "heads"))
    )
    return any(name and not name.startswith(("attn_pool", "head")) for name in having)


def small_arguments(name: str) -> dict[str, Any]:
    """The arguments of the smallest model of an architecture that takes an image, tried without computing anything."""
    for depth in DEPTHS:
        for size in SIZES:
            arguments = {**depth, **size, "num_classes": CLASSES}
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, **arguments).eval()
                    model(torch.empty(1, *_input(model, arguments)))
            except Exception:  # whatever a class says of arguments that it does not take
                continue
            return arguments
    raise InputError("it does not run on the meta device, whatever it is built with")


def _input(model: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    channels, height, width = input_size_of(model)
    side = arguments.get("img_size")
    return (channels, side, side) if side else (channels, height, width)


def shake(model: nn.Module) -> nn.Module:
    """Move every parameter off its trivial start, so that biases, norms, layer scales and tables matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.uniform_(0.5, 1.0)
    return model


def tried(name: str) -> dict[str, Any]:
    """How far an architecture gets: its class, the step that it stops at, and why."""
    with torch.device("meta"):
        whole = timm.create_model(name)
    kind = f"{type(whole).__module__.removeprefix('timm.models.')}.{type(whole).__name__}"
    found: dict[str, Any] = {"name": name, "class": kind, "attends": attends(whole)}
    if not found["attends"]:
        return found
    step = STEPS[0]
    try:
        arguments = found["arguments"] = small_arguments(name)
        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(name, **arguments).parameters())
        if count > LARGEST:
            raise InputError(f"the smallest has {count:,} parameters, which is too large to try here")
        model = shake(create_model(name, arguments)).eval()
        size = _input(model, arguments)
        step = STEPS[1]
        space = space_for(model, size)
        step = STEPS[2]
        scores, budget = importance.random(model, space=space), Budget(params=SHARE)
        inner = allocate(scores, budget, kinds=INNER_KINDS)
        step = STEPS[3]
        check_masked(model, inner)
        step = STEPS[4]
        check_counted(model, inner)
        check_counted(model, allocate(scores, budget, kinds=KINDS))
    except Exception as error:  # one that no InputError answers is a bug of ours, and shows here by its type
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return {**found, "step": step, "why": kind + " ".join(str(error).split())[:300]}
    return {**found, "step": STEPS[-1]}


def known(state: Path) -> dict[str, dict[str, Any]]:
    """What is known of each architecture; one that was begun and not ended took the process with it."""
    lines = state.read_text(encoding="utf-8").splitlines() if state.is_file() else []
    return {found["name"]: found for found in map(json.loads, lines)}


def measured(names: Sequence[str], state: Path, classes: frozenset[str]) -> Iterator[dict[str, Any]]:
    """What is known of architectures, each written to the state before the next."""
    state.parent.mkdir(parents=True, exist_ok=True)
    before = known(state)
    with state.open("a", encoding="utf-8") as file:
        for number, name in enumerate(names):
            if name not in before:
                if classes and not _is_of(name, classes):
                    continue
                begun = {"name": name, "class": "?", "attends": True, "step": STEPS[0], "why": "the process ended"}
                print(json.dumps(begun), file=file, flush=True)
                begin = time.perf_counter()
                before[name] = tried(name)
                print(json.dumps(before[name]), file=file, flush=True)
                click.echo(
                    f"{number + 1}/{len(names)} {name}: {before[name].get('step', 'no attention')} "
                    f"{before[name].get('why', '')} ({time.perf_counter() - begin:.1f} s)",
                    err=True,
                )
            if not classes or before[name]["class"].rpartition(".")[2] in classes:
                yield before[name]


def _is_of(name: str, classes: frozenset[str]) -> bool:
    """Whether an architecture's class is one of some; only modules that know their names are asked to build it."""
    if not any(hasattr(sys.modules[timm.model_entrypoint(name).__module__], kind) for kind in classes):
        return False
    with torch.device("meta"):
        return type(timm.create_model(name)).__name__ in classes


def rows_of(found: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A row for each class: how many there are and work, and of those that stop, where most do and why the first."""
    by_class: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        if one["attends"]:
            by_class.setdefault(one["class"], []).append(one)
    rows = []
    for name, members in by_class.items():
        stopped = [one for one in members if one["step"] != STEPS[-1]]
        steps = Counter(one["step"] for one in stopped)
        where = ", ".join(f"{step} ({steps[step]})" for step in STEPS if steps[step])
        why = f"{stopped[0]['name']}: {stopped[0]['why'][:160]}" if stopped else ""
        rows.append([name, len(members), len(members) - len(stopped), where, why.replace("|", "/")])
    return sorted(rows, key=lambda row: (-row[1], row[0]))


@click.command()
@click.option("--classes", default="", help="Names of model classes, separated by commas; default: all.")
@click.option("--state", type=click.Path(path_type=Path), default=Path("runs/coverage.jsonl"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "coverage", show_default=True)
def main(classes: str, state: Path, out: Path) -> None:
    """Try every transformer of timm."""
    torch.set_grad_enabled(False)
    wanted = frozenset(filter(None, classes.split(",")))
    found = list(measured(timm.list_models(), state, wanted))
    rows = rows_of(found)
    total, works = (sum(row[i] for row in rows) for i in (1, 2))
    only = f"Of the classes {classes} alone. " if classes else ""
    text = "\n".join(
        [
            "Each is built small, with random weights: a dimension space, a random plan of",
            f"{SHARE:.0%} of the parameters, and a slice that computes what the mask does, runs, and has the",
            f"parameters and multiply-adds that the space says. {only}",
            "",
            f"**{works} of {total}** architectures work, in {len(rows)} classes.",
            "",
            table(["class", "architectures", "work", "the others stop at", "the first of them"], rows, "md"),
        ]
    )
    write_results(out, "Which of timm's transformers work from end to end", environment(), text, found)


if __name__ == "__main__":
    main()
