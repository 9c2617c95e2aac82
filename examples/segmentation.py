"""A segmentor of MMSegmentation that tells digits from canvas: trained, cut by its own loss with repair, mean IoU.

It needs the extras: ``uv sync --extra detection --extra segmentation``. More in docs/segmentation.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import METRICS
from mmengine.runner import Runner
from PIL import Image
from tabulate import tabulate
from torch import nn

import sidt
from sidt.detection.data import write_digits
from sidt.detection.detectors import build_detector, detector_space, load_detector, load_weights, parts, save_detector
from sidt.detection.training import detector_loss, read_batches, train

SIZE = 64
CLASSES = ("canvas", "digit")
SCORE_IMAGES = 128


def config_of(data: Path, epochs: int) -> Config:
    """MMSegmentation's config of a small Swin, whose maps an all-MLP head reads, and of its training."""

    def loader(split: str, batch_size: int, shuffle: bool) -> dict[str, Any]:
        pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
        dataset = dict(
            type="BaseSegDataset",
            data_root=str(data),
            data_prefix=dict(img_path=split, seg_map_path=f"maps/{split}"),
            img_suffix=".png",
            seg_map_suffix=".png",
            metainfo=dict(classes=CLASSES),
            pipeline=pipeline,
        )
        sampler = dict(type="DefaultSampler", shuffle=shuffle)
        return dict(batch_size=batch_size, num_workers=0, sampler=sampler, dataset=dataset)

    model = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(
            type="SegDataPreProcessor",
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            size=(SIZE, SIZE),
        ),
        backbone=dict(
            type="mmdet.SwinTransformer",  # MMSegmentation's has the same weights by the same names
            embed_dims=48,
            depths=(2, 2, 2),
            num_heads=(2, 4, 8),
            window_size=4,
            drop_path_rate=0.0,
            out_indices=(0, 1, 2),
        ),
        decode_head=dict(
            type="SegformerHead",
            in_channels=[48, 96, 192],
            in_index=[0, 1, 2],
            channels=64,
            num_classes=len(CLASSES),
            norm_cfg=dict(type="BN"),
            loss_decode=dict(type="CrossEntropyLoss"),
        ),
        test_cfg=dict(mode="whole"),
    )
    warm_up = dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50)
    cosine = dict(type="CosineAnnealingLR", eta_min=0.0, begin=0, end=epochs, convert_to_iter_based=True)
    return Config(
        dict(
            default_scope="mmseg",
            model=model,
            train_dataloader=loader("train", 8, True),
            test_dataloader=loader("val", 16, False),
            test_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=epochs),
            test_cfg=dict(),
            optim_wrapper=dict(
                optimizer=dict(type="AdamW", lr=1.5e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0)
            ),
            param_scheduler=[warm_up, cosine],
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", max_keep_ckpts=1)),
            randomness=dict(seed=0),
        )
    )


def write_maps(folder: Path) -> None:
    """Beside a set of digits, the class of each pixel as images: 0 is the canvas, 1 a digit."""
    for split in ("train", "val"):
        (folder / "maps" / split).mkdir(parents=True, exist_ok=True)
        found = json.loads((folder / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
        maps = {image["id"]: np.zeros((image["height"], image["width"]), np.uint8) for image in found["images"]}
        for digit in found["annotations"]:  # masks of COCO run down the columns
            runs = digit["segmentation"]["counts"]
            inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(digit["segmentation"]["size"][::-1]).T
            maps[digit["image_id"]] |= inside.astype(np.uint8)
        for image in found["images"]:
            Image.fromarray(maps[image["id"]]).save(folder / "maps" / split / image["file_name"])


def mean_iou(segmentor: Any, config: Config) -> float:
    """MMSegmentation's mIoU on the test images, in percent."""
    loader = Runner.build_dataloader(config.test_dataloader, seed=0)
    metric = METRICS.build(config.test_evaluator)
    metric.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        metric.process(batch, [sample.to_dict() for sample in segmentor.eval().test_step(batch)])
    return float(metric.evaluate(len(loader.dataset))["mIoU"])


def main(folder: Path, images: int, epochs: int) -> None:
    """Train, cut, compare, save and load."""
    print(write_digits(folder / "digits", train=images, val=max(10, images // 4), size=SIZE))
    write_maps(folder / "digits")
    config = config_of(folder / "digits", epochs)
    segmentor = build_detector(config)
    load_weights(segmentor, train(config, None, folder / "states", "dense"))
    MMLogger.get_current_instance().setLevel("WARNING")  # the metric's tables

    space = detector_space(segmentor, config.model, (3, SIZE, SIZE))
    batches = read_batches(config, min(SCORE_IMAGES, images), batch_size=8)
    moments = sidt.measure_moments(segmentor, batches, forward=detector_loss, space=space)
    aligned, moments = sidt.align(segmentor, moments)
    scores = sidt.importance.taylor(aligned, batches, detector_loss, space=moments.space)
    chance = sidt.importance.random(segmentor, space=space)

    rows: list[tuple[str, int, float]] = []

    def judge(name: str, candidate: nn.Module) -> None:
        plan = getattr(candidate, "sidt_plan", None)
        cost = parts(space, plan and plan.sizes)["backbone"]
        rows.append((name, cost.params, mean_iou(candidate, config)))

    judge("dense", segmentor)
    for share in (0.4, 0.2):
        budget = sidt.Budget(params=share)
        small = sidt.compensate(aligned, sidt.allocate(scores, budget), moments)
        judge(f"{share:.0%}, its own loss, repair", small)
        judge(f"{share:.0%}, random, no repair", sidt.slice_model(segmentor, sidt.allocate(chance, budget)))
    print(tabulate(rows, headers=["backbone's parameters", "number", "mIoU"], intfmt=",", floatfmt=".1f"))

    save_detector(small, config, folder / "small", CLASSES)  # a config of MMSegmentation and its checkpoint
    again = mean_iou(load_detector(folder / "small")[0], config)
    print(f"{folder / 'small'}: mIoU {again:.1f} when it is loaded")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/example-segmentation"))
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=3)
    main(**vars(parser.parse_args()))
