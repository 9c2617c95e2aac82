"""What a model loses that is shrunk in one call: with labels and without, without a head, for some of its classes.

    python benchmarks/shrink.py --data DIR --weights FILE

DIR and FILE are those of classification.py. Nothing is trained, and no method sees a test image.
"""

from pathlib import Path

import click
import numpy as np
import torch
from cells import sample
from results import environment, write_results
from torch import nn

import sidt
from sidt.data.loading import Splits, load_data
from sidt.data.preparation import DataConfig
from sidt.export.models import create_model
from sidt.export.weights import load_weights
from sidt.importance import own_outputs, taylor
from sidt.report.tables import table
from sidt.runs.quality import neighbours
from sidt.surgery.heads import with_classes
from sidt.training.batches import make_loader
from sidt.training.evaluation import distances, evaluated, top1

HERE = Path(__file__).parent
VIT = {"img_size": 32, "patch_size": 4, "depth": 6, "num_heads": 6, "num_classes": 100}
SHARES = (0.6, 0.4, 0.2)
IMAGES = 1024


def small_ones(model: nn.Module, data: Splits, *, labels: bool, uniform: bool = False) -> list[nn.Module]:
    """What sidt.shrink makes at each share; the scores, which are the same, are taken once."""
    images = list(make_loader(sample(data.calibration, IMAGES, 0), 64))
    features = model.num_classes == 0
    aligned, moments = sidt.align(model, sidt.measure_moments(model, images))
    options = {} if labels else {"loss": own_outputs(features=features)}
    scores = taylor(aligned, images, space=moments.space, **options)
    plans = [sidt.allocate(scores, sidt.Budget(params=share), uniform=uniform) for share in SHARES]
    return [sidt.compensate(aligned, plan, moments) for plan in plans]


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--weights", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--classes", default=10, show_default=True, help="Of how many classes the subsets are.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the subsets of classes.")
@click.option("--out", default=str(HERE / "results" / "shrink"), type=click.Path(path_type=Path))
def main(data: Path, weights: Path, classes: int, seeds: str, out: Path) -> None:
    """Shrink, evaluate, write the results."""
    where = environment()
    where["command"] = f"python benchmarks/shrink.py --data DIR --weights FILE --classes {classes} --seeds {seeds}"
    config = DataConfig(name="cifar100", root=data, image_size=32, holdout=0.1)
    dense = create_model("deit_tiny_patch16_224", VIT).eval()
    load_weights(dense, weights)
    splits = load_data(config)
    kept: list[dict[str, object]] = []

    def row(name: str, values: list[str], **more: object) -> list[str]:
        kept.append({"row": name, "values": values, **more})
        click.echo([name, *values])
        return [name, *values]

    rows = [row("dense", [f"{top1(dense, splits.test):.2%}"] * len(SHARES))]
    for name, labels, uniform in (
        ("with labels", True, False),
        ("with labels, uniform sizes", True, True),
        ("without labels", False, False),
    ):
        small = small_ones(dense, splits, labels=labels, uniform=uniform)
        rows.append(row(name, [f"{top1(m, splits.test):.2%}" for m in small]))

    headless = create_model("deit_tiny_patch16_224", {**VIT, "num_classes": 0}).eval()
    headless.load_state_dict({k: v for k, v in dense.state_dict().items() if not k.startswith("head.")})
    wanted = evaluated(headless, splits.test)
    near, errors = [], []
    for model in small_ones(headless, splits, labels=False):
        seen = evaluated(_Named(model), splits.test)
        near.append(f"{(neighbours(wanted) == neighbours(seen)).float().mean():.2%}")
        errors.append(f"{distances(seen, wanted, features=True).mean():.4f}")
    features = [row("same nearest neighbour", near), row("relative squared error", errors)]

    subsets = []
    for seed in map(int, seeds.split(",")):
        chosen = np.sort(np.random.default_rng(seed).permutation(100)[:classes])
        names = tuple(splits.classes[c] for c in chosen)
        of = load_data(config.model_copy(update={"classes": names}))
        some = with_classes(dense, of.rows or ())
        before = top1(some, of.test)
        values = [f"{top1(m, of.test):.2%}" for m in small_ones(some, of, labels=True)]
        subsets.append(row(f"classes of seed {seed}", [f"{before:.2%}", *values], classes=names))
    headers = ["", *(f"{share:.0%} of the parameters" for share in SHARES)]
    text = "\n\n".join(
        [
            f"Top-1 on the {len(splits.test):,} test images, one standard error 0.7 points; {IMAGES:,} calibration "
            "images, no training, the plain ranking.",
            table(headers, rows, "md"),
            "The same model without its head, on images without labels: of the test images the part whose nearest "
            "neighbour among the others stays the same, and the error of the features.",
            table(headers, features, "md"),
            f"Of {classes} classes of 100, drawn at random: the head keeps their rows, and scores and repair see their "
            f"training images alone. Top-1 on their {50 * classes} test images (one standard error about 1.5 points), "
            "beside the dense model with the same rows of its head.",
            table(["", "dense", *headers[1:]], subsets, "md"),
        ]
    )
    write_results(out, "Shrinking in one call", where, text, kept)


class _Named(nn.Module):
    """A model whose outputs are features, whatever it says of its classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


if __name__ == "__main__":
    main()
