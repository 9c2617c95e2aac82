"""A Swin trained on CIFAR-100 on a GPU, cut to 60, 40 and 20 % of its parameters, and retrained.

    python benchmarks/retraining.py --data DIR [--set train.epochs=100]

DIR is that of configs/classification/cifar100_swin_gpu.yaml, whose trainings these are; --set changes them. What is
trained is kept below --runs, so a stopped benchmark goes on, and with --only several processes share the retrainings.
"""

import copy
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from cells import sample
from results import environment, write_results
from torch import nn

import sidt
from sidt.data.loading import Splits, load_data
from sidt.export.models import create_model
from sidt.files import read_json, write_json
from sidt.importance import taylor
from sidt.report.tables import table
from sidt.runs.config import RunConfig, read_config
from sidt.training.batches import make_loader
from sidt.training.distillation import distillation_loss
from sidt.training.evaluation import evaluated
from sidt.training.loop import fit

HERE = Path(__file__).parent
SOURCE = HERE.parent / "configs" / "classification" / "cifar100_swin_gpu.yaml"
ROWS = {"dense": 1.0, "60 %": 0.6, "40 %": 0.4, "20 %": 0.2, "10 %": 0.1}


def trained(config: RunConfig, data: Splits, folder: Path) -> nn.Module:
    """The dense model, after its training."""
    torch.manual_seed(config.seed)
    model = create_model(str(config.model.name), config.model.args)
    assert config.train is not None
    history = fit(model, data.train, config.train, folder=folder, label="dense")
    write_json(folder / "history.json", history)
    return model.eval()


def row(config: RunConfig, data: Splits, dense: nn.Module, share: float, folder: Path) -> dict[str, Any]:
    """One share: cut by the plain ranking, repaired, and retrained with the dense model as teacher."""
    device = next(dense.parameters()).device
    images = list(make_loader(sample(data.calibration, config.score.images, config.seed), 64))
    if share == 1:
        small = copy.deepcopy(dense)
    else:
        aligned, moments = sidt.align(dense, sidt.measure_moments(dense, images))
        scores = taylor(aligned, images, space=moments.space)
        small = sidt.compensate(aligned, sidt.allocate(scores, sidt.Budget(params=share)), moments)
    before = _right(small, data)
    smoothing = config.finetune.smoothing
    loss = distillation_loss(dense, small, smoothing=smoothing) if config.teacher is not None and share < 1 else None
    history = fit(small.to(device), data.train, config.finetune, folder=folder, loss=loss, label=folder.name)
    return {
        "params": sum(p.numel() for p in small.parameters()),
        "before": before,
        "after": _right(small.eval(), data),
        "history": history,
    }


def _right(model: nn.Module, data: Splits) -> list[bool]:
    """For every test image, whether the model names its class."""
    logits = evaluated(model, data.test, device=str(next(model.parameters()).device))
    found: list[bool] = (logits.argmax(-1).cpu().numpy() == data.test.labels).tolist()
    return found


def _percent(right: list[bool]) -> str:
    return f"{np.mean(right):.2%}"


def _against(right: list[bool], dense: list[bool]) -> str:
    """The difference, and one standard error of it over the images."""
    difference = np.asarray(right, float) - np.asarray(dense, float)
    return f"{100 * difference.mean():+.2f} +- {100 * difference.std(ddof=1) / len(difference) ** 0.5:.2f}"


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--set", "sets", multiple=True, help="key=value, over the config's.")
@click.option("--runs", default="runs/retraining", type=click.Path(path_type=Path), show_default=True)
@click.option("--steps", default="train,rows,write", show_default=True)
@click.option("--only", default="", help="Rows with these names, separated by commas; default: all.")
@click.option("--note", help="What else the machine was doing.")
@click.option("--out", default=str(HERE / "results" / "retraining"), type=click.Path(path_type=Path))
def main(data: Path, sets: tuple[str, ...], runs: Path, steps: str, only: str, note: str | None, out: Path) -> None:
    """Train, cut, retrain, and write the results."""
    where = environment() | ({"note": note} if note else {})
    config = read_config(SOURCE, [f"data.root={data}", *sets])
    splits = load_data(config.data)
    wanted = steps.split(",")
    if {"train", "rows"} & set(wanted):
        dense = trained(config, splits, runs / "train")  # what is trained already is read
        click.echo(f"dense: {_percent(_right(dense, splits))}")
    for name, share in ROWS.items() if "rows" in wanted else ():
        file = runs / f"row-{name.split()[0]}.json"
        if (not only or name in only.split(",")) and not file.is_file():
            write_json(file, row(config, splits, dense, share, runs / f"row {name}"))
            found = read_json(file)
            click.echo(f"{name}: {_percent(found['before'])} cut, {_percent(found['after'])} retrained")
    if "write" not in wanted:
        return
    rows = {name: file for name in ROWS if (file := runs / f"row-{name.split()[0]}.json").is_file()}
    found = {name: read_json(file) for name, file in rows.items()}
    whole = found["dense"]
    lines = [
        [
            f"{name} of the parameters" if name != "dense" else "dense, trained on as long",
            own["params"],
            _percent(own["before"]),
            _percent(own["after"]),
            _against(own["after"], whole["after"]),
            _against(own["after"], whole["before"]),
        ]
        for name, own in found.items()
    ]
    assert config.train is not None
    headers = ["", "params", "cut", "retrained", "against dense trained as long", "against dense"]
    text = (
        f"{SOURCE.name}: trained from random weights for {config.train.epochs} epochs, cut by the plain ranking with "
        f"width and repair on {config.score.images} images, then retrained for {config.finetune.epochs} epochs with "
        f"the dense model as teacher; the dense model itself for as long by its labels. Top-1 on the "
        f"{len(splits.test):,} test images; differences are paired over the images, +- one standard error; one seed."
        "\n\n" + table(headers, lines, "md")
    )
    write_results(out, "A Swin on CIFAR-100, cut and retrained", where, text, found)
    click.echo(text)


if __name__ == "__main__":
    main()
