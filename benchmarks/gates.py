"""What gates add to a training step, and how well learned gates rank.

    python benchmarks/gates.py [--root DIR --checkpoint FILE]

DIR and FILE are CIFAR-100 and the weights of configs/classification/cifar100_vit.yaml; without them the ranking is
left out. The rival of the first table multiplies activations, as ViT-Slim's own code does.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
import torch.nn.functional as F
from cells import sample
from results import environment, write_results
from torch import Tensor, nn

from sidt import importance
from sidt.allocation.greedy import allocate
from sidt.cost.budget import Budget
from sidt.data.loading import load_data
from sidt.data.preparation import DataConfig
from sidt.export.weights import load_weights
from sidt.importance.gates import GateConfig, gated, learn_gates
from sidt.importance.scores import Importance
from sidt.report.tables import table
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model
from sidt.training.batches import make_loader
from sidt.training.evaluation import correct

HERE = Path(__file__).parent
ROUNDS, GOAL, LAMBDA = 9, 1.05, 1e-3
VIT = {"img_size": 32, "patch_size": 4, "depth": 6, "num_heads": 6, "num_classes": 100}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {  # name -> model, arguments, batch and side
    "DeiT-S, 224 x 224": ("deit_small_patch16_224", {}, (4, 224)),
    "CIFAR ViT, 32 x 32": ("deit_tiny_patch16_224", VIT, (64, 32)),
}
BUDGETS = (0.6, 0.4)
TAYLOR_IMAGES, HELD_OUT = 1024, 2000
SETTINGS: dict[str, dict[str, Any]] = {
    "gates": {},
    "lambda 0": {"lambdas": 0.0},
    "lambda x 3": {"lambdas": 3e-3},
    "half the speed, 1 epoch": {"speed": 50.0, "epochs": 1},
}
GATES = ("heads", "qk", "v", "hidden")
QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)

Penalty = Callable[[], Tensor]


def activation_gates(model: Any) -> Penalty:
    """ViT-Slim's gates on activations: one for each unit of a head, at q, k and v, and one for each MLP unit."""
    gates = []
    for block in model.blocks:
        shared = nn.Parameter(torch.ones(block.attn.qkv.out_features // 3))
        hidden = nn.Parameter(torch.ones(block.mlp.fc2.in_features))
        block.attn.qkv.register_forward_hook(lambda _, args, out, g=shared: out * torch.cat([g, g, g]))
        block.mlp.fc2.register_forward_pre_hook(lambda _, args, g=hidden: (args[0] * g,))
        gates += [shared, hidden]
    model.activation_gates = nn.ParameterList(gates)
    return lambda: LAMBDA * torch.stack([gate.abs().sum() for gate in gates]).sum()


def weight_gates(placement: Any) -> Callable[[nn.Module], Penalty]:
    """SiDT's mechanism, with the gates of a placement."""

    def attach(model: nn.Module) -> Penalty:
        gates = gated(model, placement=placement)
        return lambda: gates.penalty(LAMBDA)

    return attach


SIDES: dict[str, Callable[[nn.Module], Penalty] | None] = {
    "plain step": None,
    "SiDT's gates, on weights": weight_gates("sidt"),
    "ViT-Slim's gates, on weights": weight_gates("vit-slim"),
    "ViT-Slim's gates, on activations": activation_gates,
}


def step_of(name: str, args: dict[str, Any], images: Tensor, side: str) -> tuple[Callable[[], None], int]:
    """A whole training step (forward, backward, AdamW), and the bytes that its forward keeps for its backward."""
    torch.manual_seed(0)
    model = timm.create_model(name, **args)
    attach = SIDES[side]
    penalty = attach(model) if attach else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    targets = torch.zeros(len(images), dtype=torch.int64)
    kept: dict[int, int] = {}

    def step() -> None:
        loss = F.cross_entropy(model(images), targets)
        loss = loss + penalty() if penalty else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()  # the warm-up, too
    return step, sum(kept.values())


def costs() -> dict[str, dict[str, Any]]:
    """CPU seconds of a step (others may use the machine) for every side, one number a round, all sides in turn."""
    found: dict[str, dict[str, Any]] = {}
    for case, (name, args, (batch, side)) in CASES.items():
        images = torch.randn(batch, 3, side, side)
        steps = {label: step_of(name, args, images, label) for label in SIDES}
        rows: dict[str, Any] = {label: {"seconds": [], "kept": kept} for label, (_, kept) in steps.items()}
        for _ in range(ROUNDS):
            for label, (step, _) in steps.items():
                begin = time.process_time()
                step()
                rows[label]["seconds"].append(time.process_time() - begin)
        found[f"{case}, batch {batch}"] = rows
    return found


def costs_table(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for case, sides in found.items():
        plain = sides["plain step"]
        for side, row in sides.items():
            # Round by round: a busy machine slows neighbours alike.
            ratios = [a / b for a, b in zip(row["seconds"], plain["seconds"], strict=True)]
            rows.append(
                [
                    case,
                    side,
                    f"{statistics.median(row['seconds']):.3f}",
                    f"{statistics.median(ratios):.3f}",
                    f"{min(ratios):.3f} - {max(ratios):.3f}",
                    f"{row['kept'] / 2**20:.0f}",
                    f"{row['kept'] / plain['kept']:.3f}",
                ]
            )
    headers = ["model", "side", "CPU s a step", "x plain", "min - max", "MiB kept", "x plain"]
    return table(headers, rows, "md")


def ranking(root: Path, checkpoint: Path, images: int) -> dict[str, Any]:
    """Accuracy of slices without fine-tuning, by Taylor and by gates, cut from the given or the folded model."""
    model = timm.create_model("deit_tiny_patch16_224", **VIT)
    load_weights(model, checkpoint)
    space, data = space_for(model.eval()), load_data(DataConfig(name="cifar100", root=root, download=False))
    held_out, chosen = sample(data.holdout, HELD_OUT, 0), GateConfig(precision="bf16")

    def hits(whole: nn.Module, scores: Importance) -> list[list[bool]]:
        cut = [slice_model(whole, allocate(scores, Budget(params=budget))) for budget in BUDGETS]
        return [correct(each, held_out, device="cpu").tolist() for each in (whole, *cut)]

    begin = time.perf_counter()
    taylor = importance.taylor(model, make_loader(sample(data.calibration, TAYLOR_IMAGES, 0), 64), space=space)
    seconds, found = {"Taylor": time.perf_counter() - begin}, {"Taylor": hits(model, taylor)}
    quantiles = {}
    for name, changes in SETTINGS.items():
        begin = time.perf_counter()
        learned = learn_gates(model, sample(data.train, images, 0), chosen.model_copy(update=changes), space=space)
        seconds[name] = time.perf_counter() - begin
        found[f"{name}; given weights"] = hits(model, learned.importance)
        found[f"{name}; folded weights"] = hits(learned.model, learned.importance)
        for kind in GATES:
            values = np.concatenate([v.ravel() for n, v in learned.gates.items() if n.startswith(kind)])
            quantiles[f"{name}; {kind}"] = np.quantile(values, QUANTILES).tolist()
    return {
        "config": chosen.model_dump(mode="json"),
        "images": images,
        "seconds": seconds,
        "top1": {name: [float(np.mean(each)) for each in rows] for name, rows in found.items()},
        "beside_taylor": {name: _differences(rows, found["Taylor"]) for name, rows in found.items()},
        "quantiles": quantiles,
    }


def _differences(some: list[list[bool]], others: list[list[bool]]) -> list[list[float]]:
    """Mean and standard error of the difference, image by image."""
    apart = [np.array(a, float) - np.array(b, float) for a, b in zip(some, others, strict=True)]
    return [[float(d.mean()), float(d.std() / len(d) ** 0.5)] for d in apart]


def ranking_text(found: dict[str, Any]) -> str:
    rows = []
    for name, tops in found["top1"].items():
        apart = [f"{100 * mean:+.1f} +- {100 * error:.1f}" for mean, error in found["beside_taylor"][name][1:]]
        rows.append([name, *(f"{top:.1%}" for top in tops), *(["", ""] if name == "Taylor" else apart)])
    cuts = [f"{1 - budget:.0%} fewer" for budget in BUDGETS]
    first = table(["scores", "whole", *cuts, *(f"{cut}, beside Taylor" for cut in cuts)], rows, "md")
    quantiles = [[name, *(f"{abs(v):.2f}" for v in values)] for name, values in found["quantiles"].items()]
    second = table(["gates", *(f"{q:.0%}" for q in QUANTILES)], quantiles, "md")
    config, seconds = found["config"], found["seconds"]
    how = f"lr {config['lr']:g}, speed {config['speed']:g}, lambda {config['lambdas']:g}"
    return f"""## Ranking

{first}

CIFAR-100 ViT, top-1 on {HELD_OUT} held-out images, sliced to a budget of parameters and not fine-tuned. Differences
are image by image, with one standard error. Taylor: {TAYLOR_IMAGES} images, {seconds["Taylor"]:.0f} s. Gates:
{found["images"]} images, {config["epochs"]} epochs, batches of {config["batch_size"]}, {how},
{seconds["gates"]:.0f} s; the other rows change what they name.

How far gates go (quantiles of their sizes):

{second}"""


@click.command()
@click.option("--root", type=click.Path(exists=True, path_type=Path), help="CIFAR-100.")
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="The weights of the CIFAR ViT.")
@click.option("--images", default=4096, show_default=True, help="Training images of the search stage.")
@click.option("--out", default=str(HERE / "results" / "gates"), type=click.Path(path_type=Path))
def main(root: Path | None, checkpoint: Path | None, images: int, out: Path) -> None:
    """Measure, then write the results."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = costs()
    text = f"""## The cost of a training step

{costs_table(found)}

Median of {ROUNDS} steps (forward, backward, AdamW), all sides in turn in one process; ratios are taken round by round.
MiB kept: what the forward keeps for the backward. Goal for gates on weights: at most {GOAL} x the plain step."""
    data: dict[str, Any] = {"costs": found}
    if root and checkpoint:
        data["ranking"] = ranking(root, checkpoint, images)
        text += f"\n\n{ranking_text(data['ranking'])}"
    where = environment()
    where["command"] = "python benchmarks/gates.py" + (" --root DIR --checkpoint FILE" if root and checkpoint else "")
    write_results(out, "Gates", where, text, data)
    click.echo(text)


if __name__ == "__main__":
    main()
