"""The residual width as one dimension among others, with no training: how few parameters are enough.

    python benchmarks/width.py --data DIR --weights FILE

DIR and FILE are those of classification.py. Three ways to meet each budget, all aligned and repaired: heads, q/k, v and
MLP by the plain ranking; the width with them by the plain ranking; and with the search, which is judged by the
log-likelihood of held-out images. Times are of two forwards in turn with the dense model's, at batch 1 and 32.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from cells import sample
from results import environment, write_results
from torch import nn
from torch.utils.data import Subset

from sidt import Budget, allocate, compensate, importance, measure_moments, search
from sidt.allocation.study import SearchResult
from sidt.cost.complexity import measure
from sidt.export.models import create_model
from sidt.export.weights import load_weights
from sidt.runs.report import table
from sidt.space.families import INNER_KINDS
from sidt.surgery.alignment import align
from sidt.training.batches import make_loader
from sidt.training.data import DataConfig, load_data
from sidt.training.evaluation import correct, log_likelihood

HERE = Path(__file__).parent
VIT = {"img_size": 32, "patch_size": 4, "depth": 6, "num_heads": 6, "num_classes": 100}
PARTS, ROUNDS, BATCHES = 8, 25, (1, 32)


def times(models: dict[str, nn.Module]) -> dict[str, list[float]]:
    """Median milliseconds of a forward at each batch size, the models in turn."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for batch in BATCHES:
        images, seen = torch.randn(batch, 3, 32, 32), {name: [] for name in models}
        with torch.inference_mode():
            for _ in range(ROUNDS):
                for name, model in models.items():
                    begin = time.perf_counter()
                    model(images)
                    seen[name].append(1000 * (time.perf_counter() - begin))
        for name, values in seen.items():
            found[name].append(statistics.median(values[3:]))
    return found


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--weights", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--shares", default="0.6,0.4,0.25,0.2,0.15,0.1", show_default=True, help="Parameters left.")
@click.option("--trials", default=20, show_default=True)
@click.option("--images", default=1000, show_default=True, help="Held-out images of a trial.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the sampler.")
@click.option("--out", default=str(HERE / "results" / "width"), type=click.Path(path_type=Path))
def main(data: Path, weights: Path, shares: str, trials: int, images: int, seeds: str, out: Path) -> None:
    """Run all budgets, then write the results."""
    where = environment()
    where["command"] = (
        f"python benchmarks/width.py --data DIR --weights FILE --shares {shares} --trials {trials} --images {images} "
        f"--seeds {seeds}"
    )
    dense = create_model("deit_tiny_patch16_224", VIT).eval()
    load_weights(dense, weights)
    splits = load_data(DataConfig(name="cifar100", root=data, image_size=32, holdout=0.1))
    calibration = list(make_loader(sample(splits.calibration, 1024, 0), 64))
    begin = time.perf_counter()
    aligned, moments = align(dense, measure_moments(dense, calibration))
    scores = importance.taylor(aligned, calibration, space=moments.space)
    prepared = time.perf_counter() - begin
    held, fresh = sample(splits.holdout, images, 0), sample(splits.fresh, 2500, 0)
    parts = [Subset(held, range(i, images, PARTS)) for i in range(PARTS)]

    def objective(small: nn.Module) -> Iterator[Any]:
        return (log_likelihood(small, part) for part in parts)

    def searched(budget: Budget, seed: int) -> tuple[SearchResult, float]:
        start = time.perf_counter()
        found = search(
            aligned,
            scores,
            budget,
            objective,
            fresh=lambda small: log_likelihood(small, fresh),
            trials=trials,
            seed=seed,
            slicer=lambda plan: compensate(aligned, plan, moments),
            progress=False,
        )
        return found, time.perf_counter() - start

    def top1(model: nn.Module) -> float:
        return 100 * float(correct(model, splits.test).mean())

    full, rows, kept = top1(dense), [], []
    for share in map(float, shares.split(",")):
        budget = Budget(params=share)
        plans = {
            "inner": allocate(scores, budget, kinds=INNER_KINDS),
            "width": allocate(scores, budget),
        }
        models = {name: compensate(aligned, plan, moments) for name, plan in plans.items()}
        values = {name: top1(model) for name, model in models.items()}
        found = [searched(budget, int(seed)) for seed in seeds.split(",")]
        models["search"] = compensate(aligned, found[0][0].plan, moments)
        tops = [top1(compensate(aligned, result.plan, moments)) for result, _ in found]
        taken = times({"dense": dense, **models})
        gains = [result.gain for result, _ in found if result.gain is not None]
        rows.append(
            [
                f"{share:.0%}",
                f"{values['inner']:.1f}",
                f"{values['width']:.1f}",
                f"{np.mean(tops):.1f} +- {np.std(tops, ddof=1) if len(tops) > 1 else 0:.1f}",
                " / ".join(str(result.plan.sizes["embed"]) for result, _ in found),
                f"{np.mean([g.difference for g in gains]):+.3f} +- {np.mean([g.error for g in gains]):.3f}",
                *(" / ".join(f"{taken[n][k]:.1f}" for n in ("dense", "inner", "search")) for k in range(len(BATCHES))),
            ]
        )
        click.echo(rows[-1])
        kept.append(
            {"share": share, "inner": values["inner"], "width": values["width"], "search": tops, "latency_ms": taken}
            | {"widths": {n: p.sizes["embed"] for n, p in plans.items()}}
            | {"found": [dict(r.plan.sizes) for r, _ in found], "seconds": [s for _, s in found]}
            | {"gains": [[g.difference, g.error] for g in gains]}
            | {"macs": {n: measure(m).macs for n, m in models.items()}}
        )
    headers = ["parameters left", "inner, ranking", "with width, ranking", "with width, search", "width found (of 192)"]
    headers += ["gain of the search, log-likelihood", *(f"ms at batch {b}: dense / inner / search" for b in BATCHES)]
    text = table(headers, rows, "md")
    error = np.sqrt(full * (100 - full) / len(splits.test))
    notes = (
        f"Top-1 in % on the {len(splits.test):,} test images; dense: {full:.1f} (one standard error: {error:.1f}). No "
        f"training. Search: {trials} trials of {images} held-out images, seeds {seeds}, mean +- standard deviation; "
        f"its gain over the ranking with width is on 2,500 fresh images, +- one standard error of the difference. "
        f"Moments, alignment and scores, once for all budgets: {prepared:.0f} s on 1,024 images; a search took "
        f"{min(s for k in kept for s in k['seconds']):.0f} to {max(s for k in kept for s in k['seconds']):.0f} s. The "
        f"weights were trained on all of these images but those of the test set."
    )
    write_results(out, "The width, searched with the other dimensions", where, f"{text}\n\n{notes}", kept)
    click.echo(text)


if __name__ == "__main__":
    main()
