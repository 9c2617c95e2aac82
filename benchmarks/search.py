"""What the Optuna search finds over the plain ranking with repair in every trial, by sampler, at equal trials.

    python benchmarks/search.py --data DIR --weights FILE

DIR and FILE are those of classification.py. All samplers start at the plain ranking and see the same held-out images;
what they find is judged on fresh images that no trial has seen, and on the test images.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
from cells import sample
from results import environment, write_results
from torch import nn
from torch.utils.data import Subset

from sidt import importance as criteria
from sidt.allocation.study import Sampler, SearchResult, search
from sidt.cost.budget import Budget
from sidt.data.loading import load_data
from sidt.data.preparation import DataConfig
from sidt.export.models import create_model
from sidt.export.weights import load_weights
from sidt.report.tables import table
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.alignment import align
from sidt.surgery.compensation import compensate
from sidt.surgery.moments import measure_moments
from sidt.training.batches import make_loader
from sidt.training.evaluation import correct, log_likelihood

HERE = Path(__file__).parent
VIT = {"img_size": 32, "patch_size": 4, "depth": 6, "num_heads": 6, "num_classes": 100}
PARTS = 8


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--weights", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--share", default=0.4, show_default=True, help="Parameters left.")
@click.option("--trials", default=24, show_default=True)
@click.option("--images", default=500, show_default=True, help="Held-out images of a trial.")
@click.option("--seeds", default="0", show_default=True)
@click.option("--out", default=str(HERE / "results" / "search"), type=click.Path(path_type=Path))
def main(data: Path, weights: Path, share: float, trials: int, images: int, seeds: str, out: Path) -> None:
    """Run all samplers, then write the results."""
    where = environment()
    where["command"] = (
        f"python benchmarks/search.py --data DIR --weights FILE --share {share} --trials {trials} --images {images} "
        f"--seeds {seeds}"
    )
    dense = create_model("deit_tiny_patch16_224", VIT).eval()
    load_weights(dense, weights)
    splits, space = load_data(DataConfig(name="cifar100", root=data, image_size=32, holdout=0.1)), space_for(dense)
    calibration = list(make_loader(sample(splits.calibration, 1024, 0), 64))
    aligned, moments = align(dense, measure_moments(dense, calibration, space=space))
    scores = criteria.taylor(aligned, calibration, space=space)
    held, fresh = sample(splits.holdout, images, 0), sample(splits.fresh, 2500, 0)
    parts = [Subset(held, range(i, images, PARTS)) for i in range(PARTS)]

    def objective(small: nn.Module) -> Iterator[Any]:
        return (log_likelihood(small, part) for part in parts)

    def run(sampler: Sampler, seed: int) -> tuple[SearchResult, float]:
        begin = time.perf_counter()
        found = search(
            aligned,
            scores,
            Budget(params=share),
            objective,
            fresh=lambda small: log_likelihood(small, fresh),
            trials=trials,
            seed=seed,
            sampler=sampler,
            slicer=lambda plan: compensate(aligned, plan, moments),
            progress=False,
        )
        return found, time.perf_counter() - begin

    rows, kept, tested = [], [], {}

    def top1(plan: DimensionPlan) -> float:
        return float(correct(compensate(aligned, plan, moments), splits.test).mean())

    for seed in map(int, seeds.split(",")):
        for sampler in get_args(Sampler):
            result, seconds = run(sampler, seed)
            assert result.gain is not None
            tested.setdefault("plain", top1(result.plain))
            accuracy = top1(result.plan)
            gain = f"{result.gain.difference:+.4f} +- {result.gain.error:.4f}"
            rows.append(
                [
                    sampler,
                    str(seed),
                    f"{result.value - result.plain_value:+.4f}",
                    gain,
                    f"{accuracy:.2%}",
                    str(result.pruned),
                    f"{seconds:.0f}",
                ]
            )
            click.echo(rows[-1])
            values = [t.values[0] if t.values else None for t in result.study.trials]
            kept.append(
                {"sampler": sampler, "seed": seed, "plain": result.plain_value, "best": result.value, "values": values}
                | {"multipliers": dict(result.multipliers), "fresh": [result.gain.difference, result.gain.error]}
                | {"top1": accuracy, "pruned": result.pruned, "seconds": seconds, "sizes": result.plan.sizes}
            )
    headers = ["sampler", "seed", "gain, held out", "gain, fresh", "top-1, test", "stopped early", "seconds"]
    text = table(headers, rows, "md")
    test = splits.test
    error = np.sqrt(tested["plain"] * (1 - tested["plain"]) / len(test))
    notes = (
        f"The log-likelihood of the right class, {trials} trials of {images} held-out images in {PARTS} parts, "
        f"{share:.0%} of the parameters; fresh: 2,500 images that no trial has seen, +- one standard error of the "
        f"paired difference. Plain ranking: {tested['plain']:.2%} on the {len(test):,} test images (+- {error:.2%}); "
        f"dense: {float(correct(dense, test).mean()):.2%}. The weights were trained on all of these images but those "
        "of the test set."
    )
    write_results(out, "The search, with repair in every trial", where, f"{text}\n\n{notes}", kept)
    click.echo(text)


if __name__ == "__main__":
    main()
