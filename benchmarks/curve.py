"""One Pareto study over all budgets beside a search for each budget, at equal processor time: area under the curve.

    OMP_NUM_THREADS=1 python benchmarks/curve.py --data DIR --weights FILE

DIR and FILE are those of classification.py. All see the same scores and the same held-out images, and start at the
plain ranking; their models are judged on the test images. Processor time is this process's: other work on the machine
does not count.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import optuna
import torch
from cells import sample
from optuna.trial import TrialState
from results import environment, write_results
from search import PARTS, VIT
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from sidt import importance as criteria
from sidt.allocation.curve import nearest
from sidt.allocation.greedy import allocate
from sidt.allocation.knobs import plan_at
from sidt.allocation.study import SearchResult, search
from sidt.cost.budget import Budget
from sidt.data.loading import DataConfig, load_data
from sidt.export.models import create_model
from sidt.export.weights import load_weights
from sidt.importance.scores import Importance
from sidt.report.text import table
from sidt.space.plan import DimensionPlan
from sidt.surgery.alignment import align
from sidt.surgery.compensation import compensate
from sidt.surgery.moments import measure_moments
from sidt.training.batches import make_loader
from sidt.training.evaluation import judged, log_likelihood

HERE = Path(__file__).parent
PLAIN, EACH, CURVE, SHORT = "plain ranking", "a search for each", "Pareto, as long", "Pareto, a part of it"
METHODS = (PLAIN, EACH, CURVE, SHORT)
Values = npt.NDArray[np.float64]  # [budgets, test images, (top-1, log-likelihood)]


def both(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each is right, and the log-likelihood of its class."""
    likely = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return torch.stack([(logits.argmax(-1) == targets).float(), likely], 1)


def in_memory(data: Dataset[Any]) -> TensorDataset:
    """The same images, read once."""
    images, targets = zip(*make_loader(data, 256), strict=True)
    return TensorDataset(torch.cat(images), torch.cat(targets))


def area(values: Values, shares: Sequence[float]) -> Values:
    """Of each image, the mean height of the curve over the logarithm of the share, by the trapezoid rule."""
    x = np.log(shares)
    mean: Values = np.trapezoid(values, x, axis=0) / (x[-1] - x[0])
    return mean


class Task:
    """What all of them are given, and the processor time that a study may still use."""

    def __init__(self, data: Path, weights: Path, images: int) -> None:
        dense = create_model("deit_tiny_patch16_224", VIT).eval()
        load_weights(dense, weights)
        splits = load_data(DataConfig(name="cifar100", root=data, image_size=32, holdout=0.1))
        calibration = list(make_loader(sample(splits.calibration, 1024, 0), 64))
        self.base, self.moments = align(dense, measure_moments(dense, calibration))
        self.scores: Importance = criteria.taylor(self.base, calibration, space=self.moments.space)
        held = in_memory(sample(splits.holdout, images, 0))
        self.parts = [Subset(held, range(i, images, PARTS)) for i in range(PARTS)]
        self.test, self.dense, self.until = in_memory(splits.test), dense, float("inf")

    def slicer(self, plan: DimensionPlan) -> nn.Module:
        if time.process_time() > self.until:
            raise KeyboardInterrupt  # ends the study as a user would; what is finished is in its storage
        return compensate(self.base, plan, self.moments)

    def objective(self, small: nn.Module) -> Iterator[Any]:
        return (log_likelihood(small, part) for part in self.parts)

    def search(self, share: float, **options: Any) -> SearchResult:
        return search(
            self.base,
            self.scores,
            Budget(params=share),
            self.objective,
            slicer=self.slicer,
            progress=False,
            **options,
        )

    def pareto(self, storage: str, seconds: float, share: float, seed: int) -> SearchResult:
        """A Pareto study that goes on for so much processor time."""
        options: dict[str, Any] = {"pareto": True, "storage": storage, "seed": seed}
        self.until = time.process_time() + seconds
        try:
            self.search(share, trials=10**6, **options)
        except KeyboardInterrupt:
            if time.process_time() <= self.until:  # a user's own
                raise
        finally:
            self.until = float("inf")
        return self.search(share, trials=1, **options)  # enough are finished: it only reads them

    def values(self, plan: DimensionPlan) -> Values:
        small = compensate(self.base, plan, self.moments)
        found: Values = judged(small, self.test, both, batch_size=64).astype(np.float64)
        return found


def one_seed(
    task: Task, shares: list[float], trials: int, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, list[DimensionPlan]], dict[str, Any]]:
    """The plans of each method but the plain ranking, by share, and what they took."""
    begin, each, stopped = time.process_time(), [], 0
    for share in shares:
        result = task.search(share, trials=trials, seed=seed)
        each.append(result.plan)
        stopped += result.pruned
        say(f"seed {seed}, {share:.0%}: {result.value - result.plain_value:+.4f} on held-out images")
    seconds = time.process_time() - begin
    plans = {EACH: each}
    info: dict[str, Any] = {EACH: {"seconds": seconds, "trials": trials * len(shares), "stopped": stopped}}
    with tempfile.TemporaryDirectory() as folder:
        storage, spent = f"sqlite:///{folder}/study.db", 0.0
        for name, limit in ((SHORT, seconds / len(shares)), (CURVE, seconds)):  # the longer goes on from the shorter
            begin = time.process_time()
            result = task.pareto(storage, limit - spent, shares[len(shares) // 2], seed)
            spent += time.process_time() - begin
            plans[name] = [
                plan_at(task.scores, Budget(params=share), nearest(result.front, share).knobs) for share in shares
            ]
            finished = sum(trial.state == TrialState.COMPLETE for trial in result.study.trials)
            info[name] = {"seconds": spent, "trials": finished, "front": len(result.front)}
            say(f"seed {seed}, {name}: {finished} trials, {spent:.0f} s")
    return plans, info


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--weights", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--shares", default="0.1,0.15,0.2,0.25,0.3,0.4,0.6", show_default=True, help="Parameters left.")
@click.option("--trials", default=16, show_default=True, help="Of the search for each share.")
@click.option("--images", default=500, show_default=True, help="Held-out images of a trial.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--out", default=str(HERE / "results" / "curve"), type=click.Path(path_type=Path))
def main(data: Path, weights: Path, shares: str, trials: int, images: int, seeds: str, out: Path) -> None:
    """Search with every seed, and write the results after each."""
    where = environment()
    where["command"] = (
        f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/curve.py --data DIR --weights FILE "
        f"--shares {shares} --trials {trials} --images {images} --seeds {seeds}"
    )
    where["other work"] = "on the machine; processor time is this process's own"
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a study that ran out of time is no failure
    task, parts = Task(data, weights, images), sorted(map(float, shares.split(",")))
    dense: Values = judged(task.dense, task.test, both, batch_size=64)
    plain = np.stack([task.values(allocate(task.scores, Budget(params=share))) for share in parts])
    values: dict[str, list[Values]] = {name: [] for name in METHODS}
    infos: dict[str, Any] = {}
    for seed in map(int, seeds.split(",")):
        plans, infos[str(seed)] = one_seed(task, parts, trials, seed, click.echo)
        values[PLAIN].append(plain)
        for name, chosen in plans.items():
            values[name].append(np.stack([task.values(plan) for plan in chosen]))
        text, found = summary(values, parts, infos)
        about = (
            f"Seeds: {', '.join(infos)}. For each share {trials} trials; the Pareto study has the processor time of "
            f"all of them together, or a {len(parts)}th of it. {images} held-out images a trial, one step everywhere "
            f"(a run makes four of a budget of 12 % or less, which a Pareto study cannot). Judged on the "
            f"{len(dense):,} test images (dense: {dense[:, 0].mean():.2%}, {dense[:, 1].mean():.4f}): means over "
            "the seeds, (sd) over the seeds. Area: the mean height of the curve over the logarithm of the share, by "
            "the trapezoid rule; differences are paired by image, +- one standard error over the images, the seeds' "
            "mean taken of each image first."
        )
        write_results(out, "One study for all budgets, or one for each", where, f"{about}\n\n{text}", found)
    click.echo(text)


def summary(
    values: Mapping[str, list[Values]], shares: list[float], infos: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The tables, and the same for programs."""
    texts, found = [], {"shares": shares, "seeds": dict(infos)}
    areas = {name: np.stack([area(v, shares) for v in runs]) for name, runs in values.items()}  # [seeds, images, 2]
    for column, (what, form) in enumerate((("top-1", "{:.2%}"), ("log-likelihood", "{:.4f}"))):
        rows = []
        for name, runs in values.items():
            by_seed = np.stack([v[..., column].mean(1) for v in runs])  # [seeds, shares]
            own = areas[name][..., column]
            cells = [_spread(by_seed[:, i], form) for i in range(len(shares))]
            rows.append([name, *cells[::-1], _spread(own.mean(1), form)])
            found[f"{name}, {what}"] = {"by share": by_seed.tolist(), "area": own.mean(1).tolist()}
        texts.append(f"## {what}\n\n" + table(["", *(f"{s:.0%}" for s in shares[::-1]), "area"], rows, "md"))
    rows = []
    for name, base in ((EACH, PLAIN), (CURVE, PLAIN), (SHORT, PLAIN), (CURVE, EACH), (SHORT, EACH)):
        gaps = (areas[name] - areas[base]).mean(0)
        error = gaps.std(axis=0, ddof=1) / np.sqrt(len(gaps))
        cells = [
            f"{100 * gaps[:, 0].mean():+.2f} +- {100 * error[0]:.2f}",
            f"{gaps[:, 1].mean():+.4f} +- {error[1]:.4f}",
        ]
        rows.append([name, base, *cells])
        found[f"{name} - {base}"] = {"difference": gaps.mean(0).tolist(), "error": error.tolist()}
    texts.append("## Area, beside another's\n\n" + table(["", "beside", "top-1, points", "log-likelihood"], rows, "md"))
    rows = []
    for name in METHODS[1:]:
        cells = [f"{np.mean([info[name][key] for info in infos.values()]):.0f}" for key in ("trials", "seconds")]
        rows.append([name, *cells])
    texts.append("## What they took\n\n" + table(["", "trials", "processor seconds"], rows, "md"))
    return "\n\n".join(texts), found


def _spread(runs: Values, form: str) -> str:
    spread = f" (sd {form.format(runs.std(ddof=1))})" if len(runs) > 1 and runs.std() > 0 else ""
    return form.format(runs.mean()) + spread


if __name__ == "__main__":
    main()
