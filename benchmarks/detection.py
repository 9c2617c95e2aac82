"""Detectors on the digits detection set, pruned by their own loss, by classification, and by what others rank by.

    python benchmarks/detection.py --seeds 0,1,2

For every seed: the small detector of configs/detection/digits_<backbone>.py is trained; its backbone is scored by the
detector's loss and by the cross-entropy of a linear classifier of single digits on the same backbone; plans of equal
multiply-adds are sliced, repaired and fine-tuned alike, beside the scores that other tools rank by. Everything is kept
below --runs, so a stopped benchmark goes on.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from results import environment, write_results
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from sidt import importance as criteria
from sidt.allocation.greedy import allocate
from sidt.allocation.timing import fit_latency, measure_layers
from sidt.cost.budget import Budget
from sidt.cost.latency import LayerLatencies
from sidt.data.loading import load_data
from sidt.data.preparation import DataConfig
from sidt.detection.data.digits import write_digits
from sidt.detection.data.sources import source_of
from sidt.detection.detectors.checkpoints import CONFIG, load_detector, save_detector
from sidt.detection.detectors.pyramid import only_layers
from sidt.detection.detectors.space import detector_space, parts, predict, run_backbone, whole
from sidt.detection.runs import pipeline
from sidt.detection.runs.folder import DetectionRun, input_size, open_run
from sidt.detection.training.evaluation import average_precision
from sidt.detection.training.loss import detector_loss, read_batches
from sidt.files import read_json, write_json
from sidt.importance.scores import Importance
from sidt.report.tables import table
from sidt.space.space import DimensionSpace
from sidt.space.trace import InputSize
from sidt.surgery.alignment import align
from sidt.surgery.compensation import compensate
from sidt.surgery.moments import Moments, measure_moments
from sidt.surgery.slicing import slice_model
from sidt.training.batches import make_loader

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "detection"
SCORE_IMAGES = 256
CURVE = (0.8, 0.6, 0.3, 0.2, 0.1)  # shares of the backbone's multiply-adds for the curve without fine-tuning
FINETUNED = ("Taylor, detection loss", "SiDT repair, detection loss", "SiDT repair, classification")
STEPS = ("sliced", "fine-tuned")


Level = Literal["unit", "parameter"]


class Classifier(nn.Module):
    """A detector's backbone with a linear classifier on the means of its maps."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat([m.mean((2, 3)) for m in self.backbone(images)], 1))


def digit_classifier(detector: Any, config: Config, space: DimensionSpace, seed: int) -> tuple[Classifier, Any, float]:
    """A digit classifier on the detector's backbone, images to score it with, and its accuracy on held-out digits."""
    mean, std = (tuple(v / 255 for v in config.model.data_preprocessor[name]) for name in ("mean", "std"))
    side = space.trace.input_size[1]
    data = load_data(DataConfig(name="digits", image_size=side, mean=mean, std=std, seed=seed))
    model = Classifier(detector.backbone)
    model.eval()
    with torch.no_grad():
        sets = [
            [(model(images), labels) for images, labels in make_loader(part, 64)]
            for part in (data.calibration, data.holdout)
        ]
    (train, train_labels), (held, held_labels) = [
        (torch.cat([f for f, _ in pairs]), torch.cat([n for _, n in pairs])) for pairs in sets
    ]
    fitted = LogisticRegression(max_iter=5000).fit(train.numpy(), train_labels.numpy())
    model.head = nn.Linear(*reversed(fitted.coef_.shape))
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(fitted.coef_))
        model.head.bias.copy_(torch.from_numpy(fitted.intercept_))
    images = torch.utils.data.Subset(data.calibration, range(SCORE_IMAGES))
    return model, make_loader(images, 64), float(fitted.score(held.numpy(), held_labels.numpy()))


def one_seed(backbone: str, seed: int, shares: list[float], folder: Path, data: Path, options: dict[str, Any]) -> dict:
    """Train, score, slice and fine-tune with one seed; what is there already is not done again."""
    seeded = {"randomness.seed": seed, **options}
    run = open_run(CONFIGS / f"digits_{backbone}.py", folder, seeded, {"seed": seed}, data_root=data)
    if not (folder / "dense" / CONFIG).is_file():
        click.echo(pipeline.train_dense(run))
    detector, config = load_detector(folder / "dense")
    space = detector_space(detector, config.model, input_size(run))
    batches = read_batches(config, SCORE_IMAGES, batch_size=config.train_dataloader.batch_size, seed=seed)
    classifier, digits, accuracy = digit_classifier(detector, config, space, seed)
    ways = methods(detector, batches, digits, classifier, space)
    with_all = with_width(detector, config, batches, input_size(run))
    ways["SiDT with width, detection loss"] = lambda share: with_all(Budget(macs=share))
    curves = all_curves(folder / "curves", config, ways)
    rows = {}
    for name, share, way in [("dense", 1.0, ""), *(_row(way, share) for share in shares for way in FINETUNED)]:
        place = folder / "rows" / name.replace(" ", "_").replace(",", "").replace("%", "")
        part = DetectionRun(place, run.config, run.settings)
        if not (place / "row.json").is_file():
            small = ways[way](share) if way else detector
            save_detector(small, config, place / "sliced", source_of(config, "train_dataloader").classes)
            click.echo(f"seed {seed}, {name}: {pipeline.finetune(part)}")
            row = {
                step: pipeline.evaluate_detector(where, config, space.trace.input_size, latency=False)
                for step, where in (("sliced", place / "sliced"), ("fine-tuned", place))
            }
            cost = parts(space, small.sidt_plan.sizes if way else None)["backbone"]
            write_json(place / "row.json", row | {"backbone": {"params": cost.params, "macs": cost.macs}})
        rows[name] = read_json(place / "row.json")
        click.echo(f"seed {seed}, {name}: " + ", ".join(f"{s} {rows[name][s]['bbox']['AP']:.3f}" for s in STEPS))
    return {"seed": seed, "classifier_accuracy": accuracy, "rows": rows, "curves": curves}


def _row(way: str, share: float) -> tuple[str, float, str]:
    return f"{1 - share:.0%} fewer MACs, {way}", share, way


def methods(
    detector: nn.Module, batches: list[Any], digits: Any, classifier: Classifier, space: DimensionSpace
) -> dict[str, Callable[[float], nn.Module]]:
    """Ways to a smaller detector, each from the share of the backbone's multiply-adds that is left."""

    def by_detection(model: nn.Module, level: Level = "unit") -> Importance:
        return criteria.taylor(model, batches, detector_loss, level=level, space=space)

    def by_classes(model: nn.Module) -> Importance:
        own = Classifier(model.backbone)
        own.head = classifier.head
        return criteria.taylor(own, digits, space=space)

    def sliced(score: Callable[[nn.Module], Importance]) -> Callable[[float], nn.Module]:
        once = cache(score)
        return lambda share: slice_model(detector, allocate(once(detector), Budget(macs=share)))

    @cache
    def aligned() -> tuple[nn.Module, Moments]:
        return align(detector, measure_moments(detector, batches, forward=detector_loss, space=space))

    def repaired(score: Callable[[nn.Module], Importance]) -> Callable[[float], nn.Module]:
        once = cache(score)

        def make(share: float) -> nn.Module:
            base, moments = aligned()
            return compensate(base, allocate(once(base), Budget(macs=share)), moments)

        return make

    return {
        "L2": sliced(partial(criteria.magnitude, p=2, space=space)),
        "Taylor of each parameter, detection loss": sliced(partial(by_detection, level="parameter")),
        "Taylor, classification": sliced(by_classes),
        "Taylor, detection loss": sliced(by_detection),
        "SiDT repair, classification": repaired(by_classes),
        "SiDT repair, detection loss": repaired(by_detection),
    }


def with_width(
    detector: nn.Module,
    config: Config,
    batches: list[Any],
    size: InputSize,
    *,
    on: str = "backbone",
    outside: bool = False,
) -> Callable[[Budget], nn.Module]:
    """The backbone's width with the other dimensions, by the plain ranking, as ``sidt detect search`` starts.

    The budget is of the backbone, or ``on`` the detector; ``outside``, the channels of neck and head are dimensions.
    Layers are timed on this machine's CPU if the budget has a latency.
    """

    @cache
    def scored() -> tuple[nn.Module, Moments, Importance]:
        plain, own = (detector, config) if on == "detector" else only_layers(detector, config)
        space = detector_space(plain, own.model, size, outside=outside)
        space = whole(space) if on == "detector" else space
        base, moments = align(plain, measure_moments(plain, batches, forward=detector_loss, space=space))
        return base, moments, criteria.taylor(base, batches, detector_loss, space=moments.space)

    @cache
    def timed() -> LayerLatencies:
        base, moments, _ = scored()
        return measure_layers(base, moments.space, rounds=3, forward=run, say=click.echo, progress=False)

    def make(budget: Budget) -> nn.Module:
        base, moments, scores = scored()
        latencies = None
        if budget.latency is not None:
            latencies = fit_latency(
                base, scores, budget, timed(), rounds=3, forward=run, say=click.echo, progress=False
            )
        return compensate(base, allocate(scores, budget, latencies=latencies), moments)

    run = predict if on == "detector" else run_backbone

    return make


def all_curves(folder: Path, config: Config, ways: dict[str, Callable[[float], nn.Module]]) -> dict[str, list[float]]:
    """Test AP without fine-tuning at every share of ``CURVE``, for every way; a file for each."""
    found = {}
    for name, way in ways.items():
        file = folder / f"{name.replace(' ', '_').replace(',', '')}.json"
        if not file.is_file():
            write_json(file, curve(config, (way(share) for share in CURVE)))
        found[name] = read_json(file)
        click.echo(f"{name}: " + " ".join(f"{100 * ap:.1f}" for ap in found[name]))
    return found


def curve(config: Config, smaller: Iterable[nn.Module]) -> list[float]:
    """Test AP of each of some detectors."""
    source = source_of(config, "test_dataloader")
    loader = Runner.build_dataloader(config.test_dataloader, seed=0)
    return [float(average_precision(d, loader, source.annotations, source.classes)[0]) for d in smaller]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    deviation = f" +- {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


@click.command()
@click.option("--backbone", type=click.Choice(["swin", "vit"]), default="swin", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--shares", default="0.8,0.6", show_default=True, help="Multiply-adds that are left of the backbone.")
@click.option("--runs", default="runs/detection", type=click.Path(path_type=Path), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/detection_BACKBONE.")
def main(backbone: str, seeds: str, shares: str, runs: Path, out: Path | None) -> None:
    """Run all seeds, then write the results."""
    where = environment()
    click.echo(write_digits(runs / "digits"))
    left = [float(s) for s in shares.split(",") if s]
    found = [
        one_seed(backbone, int(seed), left, runs / f"{backbone}-{seed}", runs / "digits", {})
        for seed in seeds.split(",")
    ]
    rows = []
    for name in found[0]["rows"]:
        each = [result["rows"][name] for result in found]
        scores = [[row[step]["bbox"][key] for row in each] for step in STEPS for key in ("AP", "AP50")]
        cost = each[0]["backbone"]
        label = "dense (trained on as long)" if name == "dense" else name
        rows.append([label, *map(spread, scores), cost["params"], cost["macs"]])
    headers = ["backbone", "AP", "AP50", "AP, fine-tuned", "AP50, fine-tuned", "backbone params", "backbone MACs"]
    accuracies = ", ".join(f"{result['classifier_accuracy']:.1%}" for result in found)
    images = len(read_json(runs / "digits" / "annotations" / "val.json")["images"])
    notes = (
        f"COCO box AP on the {images} test images, mean +- standard deviation over the seeds {seeds} (of training, "
        "score images and held-out digits). The first two columns are of the smaller detector as it is, the next two "
        f"after the fine-tuning of the config. Scores: group Taylor on {SCORE_IMAGES} images; plain ranking at equal "
        "multiply-adds of the backbone, no search. Accuracy of the linear digit classifier on the detector's backbone: "
        f"{accuracies}."
    )
    text = table(headers, rows, "md")
    lines = [
        [name, *(spread([result["curves"][name][i] for result in found]) for i in range(len(CURVE)))]
        for name in found[0]["curves"]
    ]
    shares_left = [f"{share:.0%} of the MACs" for share in CURVE]
    text += "\n\nAP sliced, not fine-tuned, by what is left:\n\n" + table(["scores", *shares_left], lines, "md")
    out = out or HERE / "results" / f"detection_{backbone}"
    write_results(out, f"The digits detection set, digits_{backbone}.py", where, f"{text}\n\n{notes}", found)
    click.echo(text)


if __name__ == "__main__":
    main()
