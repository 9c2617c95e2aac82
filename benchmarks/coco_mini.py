"""Mask R-CNN with a Swin-T end to end on a few photographs of COCO, dense and with a 40 % smaller backbone.

    python benchmarks/coco_mini.py --data DIR

DIR holds COCO images and annotations in COCO's own layout (train2017/, val2017/, annotations/). A few images are far
too few to train a detector: the numbers on the training images say that the whole way works, those on val2017 are near
zero. Everything is kept below --runs, so a stopped benchmark goes on.
"""

from pathlib import Path
from typing import Any

import click
from results import environment, write_results

from sidt.detection.data.sources import with_data
from sidt.detection.detectors.checkpoints import WEIGHTS, load_detector
from sidt.detection.runs import pipeline
from sidt.detection.runs.folder import SEARCH, input_size, open_run
from sidt.detection.training.evaluation import results_table
from sidt.files import read_json, write_json

HERE = Path(__file__).parent
MASK_RCNN = HERE.parent / "configs" / "detection" / "mask_rcnn_swin_t.py"


def options(epochs: int, scale: int) -> dict[str, Any]:
    """The config's changes for a CPU: no published weights, small images, few regions, a short schedule."""
    size = (scale * 5 // 3, scale)
    resizes = {"train": 2, "val": 1, "test": 1}
    pipelines = {f"{part}_dataloader.dataset.pipeline.{i}.scale": size for part, i in resizes.items()}
    return pipelines | {
        "model.backbone.init_cfg": None,
        "model.backbone.drop_path_rate": 0.0,
        "model.rpn_head.anchor_generator.scales": [4],  # the images are smaller, and so are the objects
        "model.train_cfg.rpn_proposal.nms_pre": 500,
        "model.train_cfg.rpn_proposal.max_per_img": 200,
        "model.train_cfg.rcnn.sampler.num": 64,
        "model.test_cfg.rpn.nms_pre": 500,
        "model.test_cfg.rpn.max_per_img": 200,
        "model.test_cfg.rcnn.max_per_img": 50,
        "train_dataloader.dataset.pipeline.3.prob": 0.0,  # no flips: these very images are to be learned
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "test_dataloader.num_workers": 0,
        "test_dataloader.persistent_workers": False,
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_interval": epochs + 1,
        "optim_wrapper.optimizer.lr": 3e-4,
        "param_scheduler": [
            {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": 40},
            {"type": "CosineAnnealingLR", "eta_min": 0.0, "begin": 0, "end": epochs, "T_max": epochs, "by_epoch": True},
        ],
        "default_hooks.logger.interval": 10,
        "default_hooks.checkpoint.max_keep_ckpts": 1,
        "randomness": {"seed": 0},
    }


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--epochs", default=30, show_default=True, help="Of the dense detector; fine-tuning takes a quarter.")
@click.option("--scale", default=192, show_default=True, help="The shorter side of the images in pixels.")
@click.option("--runs", default="runs/coco_mini", type=click.Path(path_type=Path), show_default=True)
@click.option("--out", default=str(HERE / "results" / "coco_mini"), type=click.Path(path_type=Path))
def main(data: Path, epochs: int, scale: int, runs: Path, out: Path) -> None:
    """Train, search at 40 % fewer parameters of the backbone, fine-tune, evaluate on both sets of images."""
    where = environment()
    where["command"] = f"python benchmarks/coco_mini.py --data DIR --epochs {epochs} --scale {scale}"
    tuned = max(1, epochs // 4)
    settings = {
        "budget": {"params": 0.6},
        "objective": "loss",
        "holdout": 4,
        "score_images": 32,
        "trials": 8,
        "finetune": {
            "train_cfg.max_epochs": tuned,
            "train_cfg.val_interval": tuned + 1,
            "param_scheduler": [
                {"type": "CosineAnnealingLR", "begin": 0, "end": tuned, "T_max": tuned, "by_epoch": True}
            ],
        },
    }
    run = open_run(MASK_RCNN, runs, options(epochs, scale), settings, data_root=data.resolve())
    if not (runs / "dense" / WEIGHTS).is_file():
        click.echo(pipeline.train_dense(run))
    if not (runs / "sliced" / WEIGHTS).is_file():
        click.echo(pipeline.search(run, click.echo))
    if not (runs / WEIGHTS).is_file():
        click.echo(pipeline.finetune(run))
    rows: dict[str, Any] = {}
    folders = {"dense": runs / "dense", "40% fewer, sliced": runs / "sliced", "40% fewer, fine-tuned": runs}
    for name, folder in folders.items():
        for images in ("train2017", "val2017"):
            done = runs / "rows" / f"{name.split()[-1]}-{images}.json"
            if not done.is_file():
                places = (data / "annotations" / f"instances_{images}.json", data / images)
                config = with_data(load_detector(folder)[1], "test_dataloader", *places)
                row = pipeline.evaluate_detector(folder, config, input_size(run), latency=False)
                write_json(done, row | {"images": len(read_json(places[0])["images"])})
            rows[f"{name}, {images}"] = read_json(done)
    found = read_json(runs / SEARCH)
    notes = (
        f"{rows['dense, train2017']['images']} photographs of train2017 (8 of them held out of the training for the "
        f"search, all of them evaluated) and {rows['dense, val2017']['images']} of val2017, shorter side {scale} px, "
        f"from random weights, {epochs} epochs; fine-tuned for {tuned}. One seed. MACs for one "
        f"image of {'x'.join(map(str, rows['dense, val2017']['input_size']))}. Search: {len(found['values'])} trials, "
        f"{found['objective']}; {found['gain']['says']}."
    )
    text = results_table(rows, "md")
    write_results(
        out, "Mask R-CNN, Swin-T, on 159 photographs of COCO", where, f"{text}\n\n{notes}", rows | {"search": found}
    )
    click.echo(text)


if __name__ == "__main__":
    main()
