"""Ways to shrink a classifier on CIFAR-100, at equal parameters and at equal multiply-adds: rows x targets x seeds.

    python benchmarks/classification.py --data DIR --weights FILE --train-images 20000 --latency

DIR holds CIFAR-100 as train.tar and val.tar. FILE is the state dict of the model in
configs/classification/cifar100_vit.yaml, or, with --model swin, the dense/ folder of a run of cifar100_swin.yaml.
Every cell (row, target, seed, training) is a file below --runs and is not done again: a stopped benchmark goes on, and
several processes with the same command share the work. The results and the picture are of the cells that are there.
"""

import copy
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import ours
import torch
from cells import DETERMINISTIC, TOOLS, Cell, Method, Setting, cached, rated, sample, work
from results import environment, write_results
from rivals import fastnas, load_shapes, save_shapes, torch_pruning
from summary import best_in_time, collected, draw, fastest, gains, label, margins, summary, tables
from torch import Tensor, nn
from training_free import corp, vbp

from sidt import importance as criteria
from sidt.allocation.greedy import allocate
from sidt.cost.complexity import measure, time_forward
from sidt.data.loading import load_data
from sidt.data.preparation import DataConfig
from sidt.export.checkpoint import load, save
from sidt.export.models import create_model
from sidt.export.weights import fit_weights, load_weights
from sidt.files import read_json, write_json
from sidt.importance.gates import GateConfig, learn_gates
from sidt.importance.placements import Placement
from sidt.importance.scores import Importance
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model
from sidt.training.distillation import distillation_loss
from sidt.training.evaluation import correct
from sidt.training.loop import TrainConfig, fit

HERE = Path(__file__).parent
VIT = ("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "depth": 6, "num_heads": 6, "num_classes": 100})
RECIPE = {"batch_size": 128, "warmup_epochs": 0.1, "smoothing": 0.1}  # and --precision
GATES = {"precision": "bf16"}  # the rest as GateConfig has it
GATE_IMAGES = 4096

# --- rows: what there is to compare -----------------------------------------------------------------------------------


def ranked(setting: Setting, name: str, score: Callable[[Setting], Importance]) -> Method:
    """Plain ranking: the units with the highest score for their cost stay."""
    file = name if name in DETERMINISTIC else f"{name}-{setting.seed}"
    scores, earlier = cached(
        setting.scratch, file, lambda: {n: torch.from_numpy(np.array(s)) for n, s in score(setting).scores.items()}
    )
    importance = Importance(setting.space, {n: s.numpy() for n, s in scores.items()})
    return slice_model(setting.dense, allocate(importance, setting.budget)), {"earlier_seconds": earlier}


def learned(setting: Setting, name: str, placement: Placement) -> Method:
    """Gates learned with the weights on training images.

    The rivals' gates are folded into the weights that were trained with them; SiDT's are scores of the given weights,
    which the gates benchmark found to be better.
    """

    def learn() -> dict[str, Tensor]:
        images = sample(setting.data.train, GATE_IMAGES, setting.seed)
        config = GateConfig(placement=placement, seed=setting.seed, **GATES)
        found = learn_gates(setting.dense, images, config, space=setting.space)
        scores = {f"scores.{n}": torch.from_numpy(np.array(s)) for n, s in found.importance.scores.items()}
        return scores | {f"model.{n}": t for n, t in found.model.cpu().state_dict().items()}

    tensors, earlier = cached(setting.scratch, f"{name}-{setting.seed}", learn)
    scores, state = (
        {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)} for part in ("scores.", "model.")
    )
    model = copy.deepcopy(setting.dense)
    if placement != "sidt":
        fit_weights(model, state, name)
    plan = allocate(Importance(setting.space, {n: s.numpy() for n, s in scores.items()}), setting.budget)
    return slice_model(model, plan), {"earlier_seconds": earlier}


def _random(s: Setting) -> Importance:
    return criteria.random(s.dense, seed=s.seed, space=s.space)


def _l1(s: Setting) -> Importance:
    return criteria.magnitude(s.dense, p=1, space=s.space)


def _l2(s: Setting) -> Importance:
    return criteria.magnitude(s.dense, p=2, space=s.space)


def _taylor_unit(s: Setting) -> Importance:
    return criteria.taylor(s.dense, s.calibration(), level="unit", space=s.space)


def _taylor_parameter(s: Setting) -> Importance:
    return criteria.taylor(s.dense, s.calibration(), level="parameter", space=s.space)


def _fisher(s: Setting) -> Importance:
    return criteria.fisher(s.dense, s.calibration(), space=s.space)


def _activation(s: Setting) -> Importance:
    return criteria.activation(s.dense, s.calibration(), space=s.space)


RANKINGS = {
    "random": _random,
    "L1": _l1,
    "L2": _l2,
    "Taylor (unit)": _taylor_unit,
    "Taylor (parameter)": _taylor_parameter,
    "Fisher": _fisher,
    "activation": _activation,
}
ROWS: dict[str, Callable[[Setting], Method]] = {
    **{name: partial(ranked, name=name, score=score) for name, score in RANKINGS.items()},
    "VTP gates": partial(learned, name="vtp", placement="vtp"),
    "ViT-Slim gates": partial(learned, name="vit-slim", placement="vit-slim"),
    "SiDT gates": partial(learned, name="sidt", placement="sidt"),
    "Taylor + least squares": ours.least_squares,
    "SiDT greedy + repair": ours.greedy,
    "SiDT repair": ours.repaired,
    "SiDT search + repair": ours.searched,
    "SiDT width": ours.width,
    "SiDT width 2 steps": partial(ours.width, steps=2),
    "SiDT width 4 steps": partial(ours.width, steps=4),
    "SiDT width 8 steps": partial(ours.width, steps=8),
    "SiDT": partial(ours.width, steps=None, trials=20),
    "SiDT round_to=8": partial(ours.width, steps=None, trials=20, round_to=8),
    "Torch-Pruning": torch_pruning,
    "ModelOpt FastNAS": fastnas,
    "CORP": corp,
    "VBP": vbp,
}

# --- cells: one file each ---------------------------------------------------------------------------------------------


def measured(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """What every cell holds. The hits on the test images, as hexadecimal bits, serve paired comparisons."""
    hits = correct(model, setting.data.test)
    counted = measure(model.cpu(), setting.space.trace.input_size)
    bits = np.packbits(hits).tobytes().hex()
    return {"top1": float(hits.mean()), "params": counted.params, "macs": counted.macs, "n": len(hits), "hits": bits}


def shrink(cell: Cell, setting: Setting, runs: Path, name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The cell of a method: its model is written beside it."""
    begin = time.perf_counter()
    model, info = (setting.dense, {}) if cell.row == "dense" else ROWS[cell.row](setting)
    seconds = time.perf_counter() - begin + info.get("earlier_seconds", 0.0)
    folder = cell.folder(runs) / "model"
    if cell.row in TOOLS:
        save_shapes(model, folder)
    else:
        save(model, folder, name=name, args=args)
    return {"seconds": seconds, "info": info} | measured(model, setting)


def model_of(cell: Cell, setting: Setting, runs: Path) -> nn.Module:
    folder = cell.folder(runs) / "model"
    return load_shapes(setting.dense, folder) if cell.row in TOOLS else load(folder)


def train(cell: Cell, setting: Setting, runs: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The cell of a training: for one seed, all rows see the same images in the same order."""
    before = read_json(cell.untrained.file(runs))
    if "failed" in before:
        return before
    model, begin = model_of(cell, setting, runs), time.perf_counter()
    data = setting.data.train
    images = sample(data, cell.images, cell.seed) if cell.images else data
    config = TrainConfig(epochs=cell.epochs or 1, lr=cell.lr, seed=cell.seed, **recipe)
    states = cell.file(runs).with_suffix("") if cell.epochs else None  # a longer training goes on after every epoch
    loss = distillation_loss(setting.dense, model, smoothing=0.1, features=0) if cell.teacher else None  # rivals too
    fit(model, images, config, folder=states, loss=loss, label=f"{cell.row}, {cell.kind} {cell.share:g}, {cell.step}")
    seconds = time.perf_counter() - begin
    found = {"seconds": seconds} | measured(model, setting)
    if states:
        shutil.rmtree(states)
    return found


# --- latency ----------------------------------------------------------------------------------------------------------


def latencies(cells: Sequence[Cell], runs: Path, setting: Setting, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Median milliseconds of 1 and of 32 images on this CPU, all models in turn, so that drift falls on all alike."""
    models = {
        label(cell.row, cell.kind, cell.share): model_of(cell, setting, runs).cpu()
        for cell in cells
        if cell.step == "no training" and cell.seed == cells[0].seed and (cell.folder(runs) / "model").is_dir()
    }
    timed: dict[str, dict[str, list[float]]] = {name: {"1": [], "32": []} for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            for batch, times in timed[name].items():
                times.append(time_forward(model, setting.space.trace.input_size, batch=int(batch), seconds=0.1))
    return {name: {batch: float(np.median(times)) for batch, times in each.items()} for name, each in timed.items()}


# --- the command ------------------------------------------------------------------------------------------------------


def all_cells(
    rows: list[str],
    targets: list[tuple[str, float]],
    seeds: list[int],
    trainings: list[dict[str, Any]],
    rates: list[float],
    runs: Path,
) -> Iterator[Cell]:
    """In the order of work. Nothing is trained at equal multiply-adds."""
    places = [("dense", "params", 1.0)] if "dense" in rows else []
    places += [(row, *target) for target in targets for row in rows if row != "dense"]
    for seed in seeds:
        for row, kind, share in places:
            if row not in DETERMINISTIC or seed == seeds[0]:
                yield Cell(row, kind, share, seed)
    for seed in seeds:
        for training in trainings:
            for row, kind, share in places:
                if kind == "params":
                    yield from rated(Cell(row, kind, share, seed, **training), rates, runs, seeds[0])


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--weights", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model", type=click.Choice(["vit", "swin"]), default="vit", show_default=True)
@click.option(
    "--rows", default=",".join(("dense", *ROWS)), show_default=True, help="To work on; the results have all there are."
)
@click.option("--collect", is_flag=True, help="Work on nothing: only write the results of what is there.")
@click.option("--budgets", default="0.8,0.6,0.4", show_default=True, help="Of the parameters, and of the MACs.")
@click.option("--kinds", default="params,macs", show_default=True, help="What the budgets are of.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--images", default=1024, show_default=True, help="Calibration images of every method.")
@click.option("--train-images", default=0, help="Also train on so many images, once.")
@click.option("--epochs", default=0, help="Also train for so many epochs.")
@click.option(
    "--lr", default="1e-4", show_default=True, help="Learning rates of all training; the first seed tells the best."
)
@click.option("--precision", type=click.Choice(["bf16", "no"]), default="bf16", show_default=True, help="Of training.")
@click.option("--teacher", is_flag=True, help="All training again, taught by the unpruned model.")
@click.option("--latency", is_flag=True, help="Time the models; let nothing else run meanwhile.")
@click.option("--runs", default="runs/classification", type=click.Path(path_type=Path), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/classification_MODEL.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw the results here.")
def main(
    data: Path,
    weights: Path,
    model: str,
    rows: str,
    collect: bool,
    budgets: str,
    kinds: str,
    seeds: str,
    images: int,
    train_images: int,
    epochs: int,
    lr: str,
    precision: str,
    teacher: bool,
    latency: bool,
    runs: Path,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Do what is not there yet, then write the results of what is."""
    if unknown := set(rows.split(",")) - {"dense", *ROWS}:
        raise click.ClickException(f"no row {sorted(unknown)[0]!r}; the rows are dense, {', '.join(ROWS)}")
    where, runs = environment(), runs / model
    recipe: dict[str, Any] = {**RECIPE, "precision": precision}
    out = out or HERE / "results" / f"classification_{model}"
    if model == "vit":
        name, args = VIT
        dense = create_model(name, args)
        load_weights(dense, weights)
    else:
        dense, config = load(weights), read_json(weights / "config.json")
        name, args = config["model"], config["args"]
    dense.eval()
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in dense.state_dict().values())).hexdigest()[:12]
    same = {"weights": digest, "images": images, "recipe": recipe}
    if not (runs / "setting.json").exists():
        write_json(runs / "setting.json", same)
    if read_json(runs / "setting.json") != same:
        raise click.ClickException(f"{runs} holds cells of another setting; choose another --runs, or remove it")
    splits = load_data(DataConfig(name="cifar100", root=data, image_size=32, holdout=0.1))
    given = Setting(dense, space_for(dense), splits, "params", 1.0, 0, images, runs / "shared")

    def make(cell: Cell) -> dict[str, Any]:
        setting = replace(given, kind=cell.kind, share=cell.share, seed=cell.seed)
        if cell.step == "no training":
            return shrink(cell, setting, runs, name, args)
        return train(cell, setting, runs, recipe)

    lengths = [{name: length} for name, length in (("images", train_images), ("epochs", epochs)) if length]
    trainings = [{**length, "teacher": taught} for length in lengths for taught in (False, True)[: 1 + teacher]]
    targets = [(kind, float(share)) for kind in kinds.split(",") for share in budgets.split(",")]
    numbers = [int(seed) for seed in seeds.split(",")]
    rates = [float(rate) for rate in lr.split(",")]
    cells = partial(all_cells, targets=targets, seeds=numbers, trainings=trainings, rates=rates, runs=runs)
    wanted = [] if collect else rows.split(",")
    work(list(cells(wanted, seeds=numbers[:1])), runs, make)
    work(list(cells(wanted)), runs, make)
    if missing := sum(not cell.file(runs).exists() for cell in cells(wanted)):
        click.echo(f"{missing} cells are not there yet: other processes are at them")
    there = [cell for cell in cells(["dense", *ROWS]) if cell.file(runs).exists()]
    if latency:
        write_json(runs / "latency.json", latencies(there, runs, given))
    timed = read_json(runs / "latency.json") if (runs / "latency.json").exists() else {}
    results = collected(there, runs)
    found = summary(results, timed)
    text = f"{tables(found)}\n\n## Beside the best rival and the dense model\n\n{margins(results)}"
    if any(row["row"] == "SiDT" for row in found):
        text += f"\n\n## What the search gained\n\n{gains(found)}"
    if timed and any(row["row"] == "SiDT" for row in found):
        text += f"\n\n## The fastest model that is as good as a rival's\n\n{fastest(found)}"
        text += f"\n\n## The best model that is as fast as a rival's\n\n{best_in_time(found)}"
    notes = (
        f"Top-1 on the {len(splits.test):,} test images, the same for all rows: mean over the seeds {seeds} (of "
        "calibration images, random scores and training) +- its standard error over the images, and (sd) the standard "
        "deviation over the seeds where the method depends on them. No method has seen the test images. "
        f"{images:,} calibration images; {' and '.join(TOOLS)} choose among their settings on held-out images, with "
        "the first seed; CORP and VBP are made here from their published formulas, in our reading "
        f"(benchmarks/training_free.py). Training: {', '.join(f'{key} {value}' for key, value in recipe.items())}, "
        "cosine; for all rows the same images in the same order, at the learning rate behind the result: of those "
        "tried the best on the test images with the first seed, for every row (the JSON has the others). method (s): "
        "wall time until the smaller model is there, with other work on the machine. ms: one forward of 1 and of 32 "
        "images on this CPU, the median over rounds of all models in turn."
    )
    where["command"] = (
        f"python benchmarks/classification.py --data DIR --weights FILE --model {model} --budgets {budgets} "
        f"--kinds {kinds} --seeds {seeds} --train-images {train_images} --epochs {epochs} --lr {lr} "
        f"--precision {precision}"
    ) + " --teacher" * teacher
    write_results(out, f"CIFAR-100, {name}", where, f"{notes}\n\n{text}", {"rows": found})
    if picture is not None:
        draw(out.with_suffix(".json"), picture)
    click.echo(text)


if __name__ == "__main__":
    main()
