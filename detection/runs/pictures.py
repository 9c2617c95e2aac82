"""Pictures: what several detectors find in the same images, side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from matplotlib.figure import Figure
from mmdet.apis import inference_detector
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from torch import nn

from sidt.files import replacing

_SCORE = 0.2  # boxes below are not drawn


def draw_side_by_side(
    detectors: Mapping[str, tuple[nn.Module, Config]], images: list[Path], classes: tuple[str, ...], path: Path
) -> None:
    """Draw one row an image, one column a detector, with the boxes that score above 0.2.

    Args:
        detectors: by title, each with its config, whose test pipeline reads the images.
        images: image files.
        classes: names for the boxes.
        path: where the picture is written.
    """
    size = 2.6
    figure = Figure(figsize=(size * len(detectors), size * len(images) + 0.3), layout="constrained")
    grid = np.asarray(figure.subplots(len(images), len(detectors), squeeze=False))
    for axes, title in zip(grid[0], detectors, strict=True):
        axes.set_title(title)
    for row, image in zip(grid, images, strict=True):
        for axes, (detector, config) in zip(row, detectors.values(), strict=True):
            axes.imshow(_drawn(detector, config, image, classes))
            axes.set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _drawn(detector: Any, config: Config, image: Path, classes: tuple[str, ...]) -> np.ndarray:
    detector.cfg = config
    found = inference_detector(detector, str(image))
    pixels = mmcv.imread(str(image), channel_order="rgb")
    # Small images are enlarged first, so that names fit beside their boxes.
    scale = max(1, round(400 / max(pixels.shape[:2])))
    found.pred_instances = found.pred_instances.cpu()
    found.pred_instances.bboxes = found.pred_instances.bboxes * scale
    if "masks" in found.pred_instances:
        found.pred_instances.masks = found.pred_instances.masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    pixels = np.repeat(np.repeat(pixels, scale, 0), scale, 1)
    painter = DetLocalVisualizer()
    painter.dataset_meta = {"classes": classes, "palette": "random"}
    painter.add_datasample("found", pixels, found, draw_gt=False, pred_score_thr=_SCORE)
    drawn: np.ndarray = painter.get_image()
    return drawn
