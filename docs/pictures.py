"""The pictures of "How it works", made by the library from a small ViT that it trains on handwritten digits.

.uv/bin/uv run python docs/pictures.py
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import timm
import torch
from torch import nn

import sidt
from sidt.data import DataConfig, load_data
from sidt.importance import Importance
from sidt.training import make_loader, top1

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = {"heads": "heads", "qk": "q/k", "v": "v", "hidden": "MLP"}
SHARES = (0.5, 0.2, 0.05)


def share_left(scores: Importance, name: str) -> np.ndarray:
    """What part of a dimension's importance is lost with all but its first units, best first: [units + 1]."""
    units = np.sort(scores.scores[name].reshape(-1, scores.scores[name].shape[-1]).mean(0))[::-1]
    return 1 - np.concatenate([[0.0], np.cumsum(units)]) / units.sum()


def draw_alignment(folder: Path, plain: Importance, aligned: Importance) -> None:
    """How much is lost with units, as the model was trained and in the basis that alignment gives it."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, {"qk.1": "q/k", "v.1": "v", "embed": "width"}.items(), strict=True):
        for scores, label in ((plain, "as trained"), (aligned, "aligned")):
            left = share_left(scores, name)
            axis.plot(np.arange(len(left)), left, label=label)
        axis.set(title=title, xlabel="units kept", ylim=(0, 1))
    axes[0].set_ylabel("part of importance lost")
    axes[0].legend()
    _save(figure, folder / "alignment.png")


def draw_width(folder: Path, base: nn.Module, scores: Importance, moments: Any, judged: Any) -> None:
    """What is right with less and less width, cut alone and cut with the repair."""
    size = scores.space.sizes["embed"]
    kept = [size * part // 16 for part in (16, 12, 8, 6, 4, 3, 2, 1)]
    rows: dict[str, list[float]] = {"sliced": [], "sliced and repaired": []}
    for count in kept:
        plan = sidt.DimensionPlan(scores.space, {"embed": np.arange(count)})  # rotated, its units are in order
        rows["sliced"].append(top1(sidt.slice_model(base, plan), judged))
        rows["sliced and repaired"].append(top1(sidt.compensate(base, plan, moments), judged))
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for label, values in rows.items():
        axis.plot(kept, [100 * value for value in values], "o-", label=label)
    axis.set(xlabel=f"width kept, of {size}", ylabel="top-1 in %", xscale="log", xticks=kept)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.legend()
    _save(figure, folder / "width.png")


def draw_allocation(folder: Path, scores: Importance) -> None:
    """What a budget leaves of every dimension."""
    space = scores.space
    blocks = range(sum(name.startswith("hidden.") for name in space.sizes))
    figure, axes = plt.subplots(1, len(SHARES), figsize=(9, 2.6), layout="constrained")
    for axis, share in zip(axes, SHARES, strict=True):
        sizes = sidt.allocate(scores, sidt.Budget(params=share)).sizes
        left = [[sizes[f"{kind}.{i}"] / space.sizes[f"{kind}.{i}"] for i in blocks] for kind in ROWS]
        left.append([sizes["embed"] / space.sizes["embed"]] * len(blocks))
        picture = axis.imshow(left, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, values in enumerate(left):
            for column, value in enumerate(values):
                dark = "white" if value < 0.6 else "black"
                axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=dark)
        axis.set(title=f"{share:.0%} of the parameters", xlabel="block", xticks=list(blocks))
        axis.set_yticks(range(len(left)), [*ROWS.values(), "width"])
    figure.colorbar(picture, ax=axes, label="part kept")
    _save(figure, folder / "allocation.png")


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(folder: Path, epochs: int = 25) -> None:
    """Train, align, score and draw.

    Args:
        folder: where the three pictures go.
        epochs: of the training.
    """
    data = load_data(DataConfig(name="digits"))
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=10
    )
    sidt.finetune(model, data.train, epochs=epochs, batch_size=32, lr=2e-3)
    batches: Iterable[Any] = make_loader(data.calibration, 64)
    base, moments = sidt.align(model, sidt.measure_moments(model, batches))
    aligned = sidt.importance.taylor(base, batches, space=moments.space)
    draw_alignment(folder, sidt.importance.taylor(model, batches), aligned)
    draw_width(folder, base, aligned, moments, data.test)
    draw_allocation(folder, aligned)


if __name__ == "__main__":
    main(Path(__file__).parent, *map(int, sys.argv[1:]))
