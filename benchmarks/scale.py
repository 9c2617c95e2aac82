"""Time and peak memory of a whole shrinking, stage by stage, beside Torch-Pruning.

    python benchmarks/scale.py [--models deit_small_patch16_224,...] [--images 32]

Weights and images are random: time depends on sizes alone. Every model has a process of its own, which Torch-Pruning
has too; what a forward and a backward pass over the same images take is measured in it first.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch
from results import environment, write_results
from torch import Tensor, nn

from sidt import Budget, align, allocate, compensate, importance, measure_moments, space_for
from sidt.export.models import create_model
from sidt.importance.criteria import cross_entropy
from sidt.report.tables import table

HERE = Path(__file__).parent
MODELS = {
    "DeiT-S": ("deit_small_patch16_224", {}),
    "ViT-B": ("vit_base_patch16_224", {}),
    "Swin-B": ("swin_base_patch4_window7_224", {}),
    "ViT-L": ("vit_large_patch16_224", {}),
    "DINOv2-g": ("vit_giant_patch14_dinov2", {"img_size": 224, "num_classes": 1000}),
}
SHARE = 0.4
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
OWN = ("space", "moments", "align", "score", "allocate", "slice and repair")
OTHERS = ("graph", "gradients", "prune")


class Stages:
    """What each stage took: seconds by a clock, and the peak of the process's memory meanwhile, in GiB."""

    def __init__(self, clock: str) -> None:
        self.clock, self.found = CLOCKS[clock], dict[str, tuple[float, float]]()

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
        begin = self.clock()
        result = work()
        seconds = self.clock() - begin
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        self.found[name] = (seconds, peak / 2**20)
        click.echo(f"{name}: {seconds:.1f} s, {peak / 2**20:.1f} GiB", err=True)
        click.echo(json.dumps({"stages": self.found}))  # what is known if the next one does not end
        return result


def passes(stages: Stages, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """A forward, and a forward and backward, over all images: what no method does without."""

    def forward() -> None:
        with torch.no_grad():
            for images, _ in batches:
                model(images)

    def backward() -> None:
        for batch in batches:
            torch.autograd.grad(cross_entropy(model, batch), [p for p in model.parameters() if p.requires_grad])

    stages.run("forward", forward)
    stages.run("forward and backward", backward)


def ours(stages: Stages, models: list[nn.Module], batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """The dense model, alone in its list, is let go once its aligned copy is there."""
    space = stages.run("space", lambda: space_for(models[0]))
    moments = stages.run("moments", lambda: measure_moments(models[0], batches, space=space))
    aligned, moments = stages.run("align", lambda: align(models[0], moments))
    models.clear()
    group = len(batches[0][1])
    scores = stages.run("score", lambda: importance.taylor(aligned, batches, group=group, space=moments.space))
    plan = stages.run("allocate", lambda: allocate(scores, Budget(params=SHARE)))
    small: nn.Module = stages.run("slice and repair", lambda: compensate(aligned, plan, moments))
    return small


def torch_pruning(stages: Stages, model: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Width, heads and MLPs by Taylor scores, at one ratio; its search for the budget's ratio is not counted."""
    tp = import_module("torch_pruning")
    attentions = [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]

    def gradients() -> None:
        for batch in batches:
            cross_entropy(model, batch).backward()

    pruner = stages.run(
        "graph",
        lambda: tp.pruner.BasePruner(
            model,
            batches[0][0][:1],
            tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=1 - SHARE**0.5,
            num_heads={m.qkv: m.num_heads for m in attentions},
            prune_head_dims=True,
            ignored_layers=[model.get_classifier()],
        ),
    )
    stages.run("gradients", gradients)
    stages.run("prune", pruner.step)


def one(name: str, images: int, batch: int, clock: str, method: str) -> dict[str, Any]:
    """All stages of one method on one model, in this process."""
    torch.manual_seed(0)
    timm_name, args = MODELS[name]
    models = [create_model(timm_name, args).eval()]
    batches = [
        (torch.randn(min(batch, images - i), 3, 224, 224), torch.arange(min(batch, images - i)) % 1000)
        for i in range(0, images, batch)
    ]
    stages = Stages(clock)
    dense = sum(p.numel() for p in models[0].parameters())
    passes(stages, models[0], batches)
    if method == "SiDT":
        small = ours(stages, models, batches)
        return {"stages": stages.found, "params": dense, "left": sum(p.numel() for p in small.parameters())}
    try:
        torch_pruning(stages, models[0], batches)
    except Exception as error:  # whatever a rival raises is its result
        return {"stages": stages.found, "failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return {"stages": stages.found, "params": dense, "left": sum(p.numel() for p in models[0].parameters())}


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--images", default=32, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--clock", default="wall", show_default=True, type=click.Choice(list(CLOCKS)))
@click.option("--methods", default="SiDT,Torch-Pruning", show_default=True)
@click.option("--note", help="What else the machine was doing.")
@click.option("--only", help="Internal: MODEL/METHOD, in this process, as JSON.")
@click.option("--out", default=str(HERE / "results" / "scale"), type=click.Path(path_type=Path))
def main(
    models: str, images: int, batch: int, clock: str, methods: str, note: str | None, only: str | None, out: Path
) -> None:
    """Run every model with every method, then write the results."""
    if only is not None:
        name, method = only.split("/")
        click.echo(json.dumps(one(name, images, batch, clock, method)))
        return
    where, found = environment() | ({"note": note} if note else {}), {}
    for name in models.split(","):
        for method in methods.split(","):
            click.echo(f"{name}, {method}")
            command = [sys.executable, "-W", "ignore", __file__, "--only", f"{name}/{method}"]
            command += ["--images", str(images), "--batch", str(batch), "--clock", clock]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            lines = done.stdout.strip().splitlines()
            found[f"{name}/{method}"] = json.loads(lines[-1]) if lines else {"stages": {}}
            if done.returncode:
                why = ", out of memory?" if done.returncode == -signal.SIGKILL else ""
                found[f"{name}/{method}"]["failed"] = f"ended with code {done.returncode}{why}"
    text = "\n\n".join(_table(found, models.split(","), method) for method in methods.split(","))
    write_results(
        out, "Scale: time and memory of every stage", where, f"{_about(images, batch, clock)}\n\n{text}", found
    )
    click.echo(text)


def _about(images: int, batch: int, clock: str) -> str:
    return (
        f"Random weights, {images} random images of 224 x 224, batches of {batch}, {SHARE:.0%} of the parameters left. "
        f"Each cell: {clock} seconds, and the peak memory of the process in GiB, the model and the images included. "
        f"'All but the passes': the stages' sum without one forward (moments) and one forward and backward (score)."
    )


def _table(found: dict[str, Any], models: list[str], method: str) -> str:
    stages = ("forward", "forward and backward", *(OWN if method == "SiDT" else OTHERS))
    rows = []
    for name in models:
        result = found[f"{name}/{method}"]
        seen = result["stages"]
        cells = [f"{seen[s][0]:.1f} s, {seen[s][1]:.1f}" if s in seen else "-" for s in stages]
        own = [seen[s][0] for s in stages[2:] if s in seen]
        without = sum(own) - seen["forward and backward"][0] if own else 0.0
        if method == "SiDT" and own:
            without -= seen["forward"][0]
        rows.append([name, *cells, result.get("failed") or f"{without:.1f} s"])
    return f"## {method}\n\n" + table(["", *stages, "all but the passes"], rows, "md")


if __name__ == "__main__":
    main()
