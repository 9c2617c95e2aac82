"""A detector of MMDetection on digits: trained, searched on its own loss, fine-tuned, evaluated, and used.

It needs the extra: ``uv sync --extra detection``. The same steps as commands: docs/own_detector.md.
"""

import argparse
from importlib import resources
from pathlib import Path

from mmdet.apis import DetInferencer

from sidt.detection.data import write_digits
from sidt.detection.runs import open_run
from sidt.detection.runs.pipeline import evaluate, finetune, search, train_dense


def main(folder: Path, images: int, epochs: int, trials: int) -> None:
    """Do all of it in a folder; what is stopped goes on where it was."""
    print(write_digits(folder / "digits", train=images, val=max(10, images // 10)))
    values = {"train_cfg.max_epochs": epochs, "train_cfg.val_interval": epochs}
    settings = {"trials": trials, "score_images": min(128, images)}
    with resources.as_file(resources.files("sidt.configs") / "detection" / "digits_swin.py") as config:
        run = open_run(config, folder / "run", values, settings, data_root=folder / "digits")
    print(train_dense(run))
    print(search(run, print))
    print(finetune(run, values))
    print(evaluate(run, latency=False))
    inferencer = DetInferencer(str(run.folder / "config.py"), str(run.folder / "model.safetensors"), device="cpu")
    found = inferencer(str(folder / "digits" / "val"), out_dir=str(folder / "found"))
    print(f"boxes in {len(found['predictions'])} images -> {folder / 'found'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/example-detector"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--trials", type=int, default=10)
    main(**vars(parser.parse_args()))
