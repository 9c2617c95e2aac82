"""A detector of blood cells, pruned by its own loss, beside what others rank by and repair with.

    python benchmarks/bccd.py --data DIR --seeds 0,1,2 --backbone swin

DIR is BCCD in COCO's format (docs/detection.md says where it is from). For every seed the detector of
configs/detection/bccd_<backbone>.py is trained; its backbone is cut to shares of its parameters and of its
multiply-adds, by the plain ranking; some are fine-tuned with the dense detector as teacher; some are searched by
trials. Everything is kept below --runs, so a stopped benchmark goes on, and with --only several processes share its
work.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from bccd_search import TRIALS, search_table, searched
from bccd_tables import (
    DENSE,
    FAST,
    KINDS,
    OURS,
    SCORES,
    SEARCHED,
    SHARES,
    TAYLOR,
    TUNED,
    WHOLE,
    WHOLE_SHARES,
    dense_line,
    fast_table,
    finished,
    name_of,
    place_of,
    plain,
    put_back,
    tuned_table,
    untrained_table,
    whole_table,
)
from cells import RivalError, Setting
from mmengine.config import Config
from results import environment, write_results
from torch import Tensor, nn
from training_free import corp, vbp

from detection import curve, with_width
from sidt import importance as criteria
from sidt.allocation.greedy import allocate
from sidt.cost.budget import Budget
from sidt.cost.clock import time_in_turn
from sidt.detection.data.sources import source_of
from sidt.detection.detectors.backbones import searchable
from sidt.detection.detectors.checkpoints import CONFIG, load_detector, save_detector
from sidt.detection.detectors.pyramid import only_layers
from sidt.detection.detectors.space import detector_space, parts, predict
from sidt.detection.runs import pipeline
from sidt.detection.runs.folder import DetectionRun, input_size, open_run
from sidt.detection.training.loss import detector_loss, read_batches
from sidt.errors import InputError
from sidt.files import read_json, write_json
from sidt.importance.scores import Importance
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model
from sidt.training.devices import resolve_device

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "detection"
SCORE_IMAGES = 128
Way = Callable[[Budget], nn.Module]


@dataclass(frozen=True)
class OfDetector(Setting):
    """What CORP and VBP are given: the backbone alone, on the images that the detector's loss sees."""

    batches: list[Any]
    detector: Any

    def calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            images = self.detector.data_preprocessor(copy.deepcopy(batch), False)["inputs"]
            yield images, torch.zeros(len(images))


def ways_of(detector: Any, config: Config, batches: list[Any], size: tuple[int, int, int], seed: int) -> dict[str, Way]:
    """Ways to a smaller detector, each from a budget of the backbone."""
    space = detector_space(detector, config.model, size)

    def sliced(score: Callable[[], Importance]) -> Way:
        once = cache(score)
        return lambda budget: slice_model(detector, allocate(once(), budget))

    def rival(method: Callable[[Setting], Any]) -> Way:
        def make(budget: Budget) -> nn.Module:
            kind = "params" if budget.params is not None else "macs"
            share = budget.params if budget.params is not None else budget.macs
            given = _setting(detector, batches, size, kind, float(share or 0))
            twin = copy.deepcopy(detector)
            made = method(given)[0].to(next(detector.parameters()).device)
            if searchable(twin.backbone)[0]:  # a model of timm, in a backbone that is no more than its maps
                twin.backbone.model = made
            else:
                twin.backbone = made
            return twin

        return make

    scored = partial(criteria.taylor, detector, batches, detector_loss, space=space)
    return {
        OURS: with_width(detector, config, batches, size),
        f"{OURS} {WHOLE}": with_width(detector, config, batches, size, on="detector", outside=True),
        f"backbone {WHOLE}": with_width(detector, config, batches, size, on="detector"),
        TAYLOR: sliced(partial(scored, level="parameter")),
        "CORP": rival(corp),
        "VBP": rival(vbp),
        "L2": sliced(partial(criteria.magnitude, detector, p=2, space=space)),
        "random": sliced(partial(criteria.random, detector, seed=seed, space=space)),
    }


def _setting(detector: Any, batches: list[Any], size: tuple[int, int, int], kind: str, share: float) -> OfDetector:
    twin = copy.deepcopy(detector).cpu().eval()
    data: Any = None  # neither trains, and neither chooses by held-out images
    dense = searchable(twin.backbone)[1]
    return OfDetector(dense, space_for(dense, size), data, kind, share, 0, SCORE_IMAGES, Path(), batches, twin)


def out_of_reach(error: RivalError | InputError) -> str:
    """What a method says of a budget that it cannot meet, which is a result; any other error is none."""
    if isinstance(error, InputError) and "cannot be met" not in str(error):
        raise error
    return str(error)


def open_seed(config: Path, seed: int, folder: Path, data: Path, epochs: int | None) -> DetectionRun:
    """A run of a config with a seed; another number of epochs is to try the benchmark, not for results."""
    options: dict[str, Any] = {"randomness.seed": seed}
    if epochs is not None:
        options |= {"train_cfg.max_epochs": epochs, "train_cfg.val_interval": epochs}
    run = open_run(config, folder, options, {"seed": seed}, data_root=data)
    if epochs is not None:
        run.settings.finetune.update({"train_cfg.max_epochs": epochs, "train_cfg.val_interval": epochs})
    return run


def train(run: DetectionRun) -> None:
    """The dense detector, if it is not there."""
    if not (run.folder / "dense" / CONFIG).is_file():
        click.echo(pipeline.train_dense(run))


def prepared(run: DetectionRun, seed: int) -> tuple[Any, Config, dict[str, Way]]:
    """The dense detector on its device, and the ways to a smaller one."""
    detector, config = load_detector(run.folder / "dense")
    detector.to(resolve_device("auto"))
    batches = read_batches(config, SCORE_IMAGES, batch_size=config.train_dataloader.batch_size, seed=seed)
    return detector, config, ways_of(detector, config, batches, input_size(run), seed)


def untrained(run: DetectionRun, seed: int, only: str) -> None:
    """Test AP of every way at every share without training; a file for each."""
    _, config, ways = prepared(run, seed)
    if not (run.folder / SCORES).is_file():
        dense = pipeline.evaluate_detector(run.folder / "dense", config, input_size(run), per_class=True, latency=False)
        write_json(run.folder / SCORES, dense["bbox"])
    for name, way in ((name, way) for name, way in ways.items() if not name.endswith(WHOLE)):
        for kind in KINDS:
            file = run.folder / "curves" / f"{plain(name)}-{kind}.json"
            if only not in f"{name} {kind}" or file.is_file():
                continue
            found: list[float | None] = []
            for share in SHARES:
                try:
                    found += curve(config, [way(Budget(**{kind: share}))])
                except (RivalError, InputError) as error:
                    click.echo(f"{name}, {share:.0%} of the {kind}: {out_of_reach(error)}")
                    found.append(None)
            write_json(file, found)
            click.echo(f"seed {seed}, {name}, {kind}: {[_percent(ap) for ap in found]}")


def of_the_whole(run: DetectionRun, seed: int, only: str) -> None:
    """Test AP without training where the budget is the detector's; a detector for each."""
    dense, config, ways = prepared(run, seed)
    for name, way in ((name, way) for name, way in ways.items() if name.endswith(WHOLE)):
        for kind, share in [*(("macs", share) for share in WHOLE_SHARES), *(("latency", share) for share in FAST)]:
            place = run.folder / WHOLE / place_of(name, kind, share)
            if only not in f"{name} {kind}" or (place / "row.json").is_file():
                continue
            try:
                small = way(Budget(**{kind: share}))
            except InputError as error:
                click.echo(f"{name}, {share:.0%}: {out_of_reach(error)}")
                write_json(place / "row.json", None)
                continue
            ap = curve(config, [small])[0]
            save_detector(copy.deepcopy(small).cpu(), config, place, source_of(config, "train_dataloader").classes)
            costs = parts(small.sidt_plan.space, small.sidt_plan.sizes)
            row: dict[str, Any] = {"AP": ap, "macs": {part: row.macs for part, row in costs.items()}}
            if kind == "latency":
                image, pair = torch.randn(1, *input_size(run)), {"dense": dense.eval(), "small": small.eval()}
                calls = {each: partial(_infer, detector, image) for each, detector in pair.items()}
                row["ms"] = time_in_turn(calls, rounds=9, seconds=15)
            write_json(place / "row.json", row)
            click.echo(f"seed {seed}, {name}, {share:.0%} of the detector's {kind}: {_percent(ap)} {row.get('ms', '')}")


def tuned(run: DetectionRun, seed: int, only: str) -> None:
    """What is fine-tuned, and the dense detector trained on for as long; a folder for each."""
    detector, config, ways = prepared(run, seed)
    for row in [(DENSE, "params", 1.0), *TUNED]:
        place = run.folder / "rows" / plain(name_of(*row))
        if only not in name_of(*row) or (place / "row.json").is_file():
            continue
        way, kind, share = row
        made = ways[f"{way} {WHOLE}" if kind == WHOLE else way] if way != DENSE else None
        try:
            small = detector if made is None else made(Budget(**{"macs" if kind == WHOLE else kind: share}))
        except InputError as error:
            click.echo(f"{name_of(*row)}: {out_of_reach(error)}")
            continue
        rotated = way == OURS and kind != WHOLE  # then a pyramid may have one layer more
        own = only_layers(detector, config)[1] if rotated else config
        save_detector(copy.deepcopy(small).cpu(), own, place / "sliced", source_of(config, "train_dataloader").classes)
        if not (place / "dense").exists():
            shutil.copytree(run.folder / "dense", place / "dense")  # the teacher
        part = DetectionRun(place, run.config, run.settings, run.options, run.data_root)
        click.echo(f"seed {seed}, {name_of(*row)}: {pipeline.finetune(part, teacher=way != DENSE)}")
        size = input_size(run)
        found = {
            step: pipeline.evaluate_detector(where, config, size, per_class=True, latency=False)
            for step, where in (("sliced", place / "sliced"), ("fine-tuned", place))
        }
        space = detector_space(detector, config.model, size)
        plan = getattr(small, "sidt_plan", None)
        cost = parts(space if plan is None else plan.space, plan.sizes if plan is not None else None)["backbone"]
        write_json(place / "row.json", found | {"backbone": {"params": cost.params, "macs": cost.macs}})
        aps = ", ".join(f"{step} {_percent(found[step]['bbox']['AP'])}" for step in found)
        click.echo(f"seed {seed}, {name_of(*row)}: {aps}")


def _percent(ap: float | None) -> str:
    return "-" if ap is None else f"{100 * ap:.1f}"


def latencies(run: DetectionRun) -> dict[str, float]:
    """Milliseconds of whole detectors on this CPU, one image, timed in turn."""
    size, calls = input_size(run), dict[str, Callable[[], None]]()
    for name in (name for name in finished([run.folder]) if name.startswith((DENSE, OURS))):
        place = run.folder / "rows" / plain(name)
        if (place / CONFIG).is_file():
            calls[name] = partial(_infer, load_detector(place)[0].eval(), torch.randn(1, *size))
    return time_in_turn(calls, rounds=9, seconds=120)


def whole_latencies(run: DetectionRun) -> dict[str, float]:
    """Milliseconds of the detectors of :func:`of_the_whole`, and of the dense one, all in turn."""
    size, calls = input_size(run), dict[str, Callable[[], None]]()
    for folder in (run.folder / "dense", *sorted((run.folder / WHOLE).iterdir())):
        if (folder / CONFIG).is_file():
            calls[folder.name] = partial(_infer, load_detector(folder)[0].eval(), torch.randn(1, *size))
    return time_in_turn(calls, rounds=9, seconds=120)


@torch.inference_mode()
def _infer(detector: nn.Module, images: Tensor) -> None:
    predict(detector, images)


# What is done with a dense detector, by name.
STEPS: dict[str, Callable[[DetectionRun, int, str], None]] = {
    "untrained": untrained,
    WHOLE: of_the_whole,
    "tuned": tuned,
    SEARCHED: searched,
}
_WHAT = {"bccd_swin.py": "a small Swin", "bccd_vit.py": "a small plain ViT with a simple pyramid"}


def text_of(name: str, seeds: str, folders: list[Path], times: dict[str, float], whole_times: dict[str, float]) -> str:
    """The results as tables; what was not measured with every seed says so."""
    of_all = whole_table(folders, whole_times) if whole_times else ""
    trials, curves = search_table(folders), any((folders[0] / "curves").glob("*"))
    paragraphs = [
        f"{name}: {_WHAT[name]} and ATSS, trained from random weights on BCCD's 292 training images but those "
        "that are held out, tested on its 72 test images. COCO box AP in percent, mean +- standard deviation over the "
        f"seeds {seeds} (of training, score images and random scores). Plans are the plain ranking's within the budget "
        f"of the backbone; scores and moments are of the detector's own loss on {SCORE_IMAGES} images. SiDT aligns, "
        "cuts the width too, and repairs; Taylor of each parameter is what Torch-Pruning ranks by, on the same "
        "dimensions but the width; CORP and VBP are made from their formulas, on the backbone. '-': a method cannot "
        "get that small.",
        *(["Without training:", *(untrained_table(folders, kind) for kind in KINDS)] if curves else []),
        dense_line(folders),
        "Without training, where the budget is that of the whole detector: with the channels of neck and head as "
        f"dimensions, and without. Dense: {whole_times['dense']:.1f} ms, of the first seed, as all here."
        if of_all
        else "",
        of_all,
        "The same for a latency on one core of this machine's CPU, by the time of every layer; timed in turn with the "
        "dense detector, of every seed."
        if of_all
        else "",
        fast_table(folders) if of_all else "",
        "Fine-tuned for the config's 12 epochs, the sliced ones with the dense detector as teacher. Latency: the whole "
        "detector of one seed, one image of 320 x 240 on this machine's CPU, all in turn.",
        tuned_table(folders, times) if times else "None yet.",
        f"A search of {TRIALS} trials by AP on the held-out images, then fine-tuned alike; the gain over the plain "
        "ranking is on as many fresh images, with the standard error of each seed's:"
        if trials
        else "",
        trials,
    ]
    return "\n\n".join(filter(None, paragraphs))


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--backbone", type=click.Choice(["swin", "vit"]), default="swin", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--runs", type=click.Path(path_type=Path), help="Default: runs/bccd_BACKBONE.")
@click.option("--steps", default=",".join(["train", *STEPS, "write"]), show_default=True)
@click.option("--only", default="", help="Rows whose name holds this; for all steps but train and write.")
@click.option("--epochs", type=int, help="Of every training, to try the benchmark.")
@click.option("--where", type=click.Path(path_type=Path), help="A file with the environment of the trainings.")
@click.option("--earlier", type=click.Path(exists=True, path_type=Path), help="Results to add to, whose runs are gone.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/bccd, or bccd_vit.")
def main(
    data: Path,
    backbone: str,
    seeds: str,
    runs: Path | None,
    steps: str,
    only: str,
    epochs: int | None,
    where: Path | None,
    earlier: Path | None,
    out: Path | None,
) -> None:
    """Run some steps of all seeds, then write the results."""
    wanted, numbers = steps.split(","), [int(seed) for seed in seeds.split(",")]
    config, runs = CONFIGS / f"bccd_{backbone}.py", runs or Path("runs") / f"bccd_{backbone}"
    folders = [runs / f"seed-{seed}" for seed in numbers]
    known = {} if earlier is None else read_json(earlier)["results"]
    for folder in folders:
        put_back(known.get("seeds", {}).get(folder.name, {}), folder)
    for seed, folder in zip(numbers, folders, strict=True):
        run = open_seed(config, seed, folder, data, epochs)
        if "train" in wanted:
            train(run)
        for name, step in STEPS.items():
            if name in wanted:
                step(run, seed, only)
    if "environment" in wanted:
        click.echo(json.dumps(environment()))
    if "write" not in wanted:
        return
    own = "" if backbone == "swin" else f" --backbone {backbone}"
    here = environment() | {"command": f"python benchmarks/bccd.py --data DIR --seeds {seeds}{own}"}
    there = [f for f in zip(numbers, folders, strict=True) if (f[1] / "rows" / plain(DENSE) / CONFIG).is_file()]
    times, whole_times = known.get("ms", {}), known.get("ms of the whole", {})
    if there:
        first = open_seed(config, *there[0], data, epochs)
        times = latencies(first)
        whole_times = whole_latencies(first) if all((f / WHOLE).is_dir() for f in folders) else whole_times
    text = text_of(config.name, seeds, folders, times, whole_times)
    facts = {
        folder.name: {
            "dense": read_json(folder / SCORES),
            "curves": {f.stem: read_json(f) for f in sorted((folder / "curves").glob("*.json"))},
            **{
                kept: {f.parent.name: read_json(f) for f in sorted((folder / kept).glob("*/row.json"))}
                for kept in ("rows", WHOLE, SEARCHED)
            },
        }
        for folder in folders
    }
    trained_on = read_json(where) if where is not None else here
    if where is not None:
        text += f"\n\nTrained and tested on {trained_on['machine']}, with torch {trained_on['versions']['torch']}."
    write_results(
        out or HERE / "results" / ("bccd" if backbone == "swin" else f"bccd_{backbone}"),
        f"Blood cells, {config.name}",
        here,
        text,
        {"trained on": trained_on, "seeds": facts, "ms": times, "ms of the whole": whole_times},
    )
    click.echo(text)


if __name__ == "__main__":
    main()
