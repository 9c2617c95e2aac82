"""Pictures of what a run found."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from sidt.allocation.curve import Point
from sidt.files import replacing
from sidt.space.families import KINDS
from sidt.space.plan import DimensionPlan

matplotlib.use("Agg")


def plot_kept(plan: DimensionPlan, path: Path) -> None:
    """Draw the kept share of every dimension: one row a kind, one column a block."""
    space, sizes = plan.space, plan.sizes
    kinds = [k for k in KINDS[1:] + KINDS[:1] if any(d.kind == k for d in space.dimensions.values())]
    blocks = space.blocks()
    figure = Figure(figsize=(1.6 + 0.62 * max(len(blocks), 6), 1.2 + 0.55 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for column, block in enumerate(blocks):
        for row, kind in enumerate(kinds):
            here = [d for d in space.in_block(block) if d.kind == kind]
            if not here:
                continue
            kept = [sizes[d.name] if d.per is None or sizes[d.per] else 0 for d in here]
            grid[row, column] = sum(kept) / max(sum(d.size for d in here), 1)
            axes.text(
                column,
                row,
                "\n".join(map(str, kept)),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if grid[row, column] > 0.45 else "white",
            )
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(blocks)), [space.title(block) for block in blocks])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.set_title("units kept (q/k and v: per head)")
    figure.colorbar(image, ax=axes, label="share kept")
    _save(figure, path)


def plot_search(values: Sequence[float], plain: float, dense: float | None, score: str, path: Path) -> None:
    """Draw the score of every trial, the best so far, the plain ranking and the dense model."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(values)), values, "o", markersize=4, alpha=0.6, label="trial")
    axes.step(range(len(values)), np.maximum.accumulate(values), where="post", label="best so far")
    axes.axhline(plain, linestyle="--", color="gray", label="plain ranking")
    if dense is not None:
        axes.axhline(dense, linestyle=":", color="black", label="dense")
    axes.set_xlabel("trial")
    axes.set_ylabel(score)
    axes.legend()
    _save(figure, path)


def plot_front(
    front: Sequence[Point],
    trials: Sequence[tuple[float, float, bool]],
    dense: float,
    kind: str,
    score: str,
    path: Path,
) -> None:
    """Draw the curve of a Pareto search: score against the part of the dense model's cost.

    Args:
        front: the curve.
        trials: of each its share, its score, and whether it is the plain ranking.
        dense: the dense model's score.
        kind: what the share is of.
        score: what the score is.
        path: the picture.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*((100 * share, value) for share, value, _ in trials), strict=True), ".", color="C7", label="trial")
    plain = sorted((100 * share, value) for share, value, is_plain in trials if is_plain)
    if plain:
        axes.plot(*zip(*plain, strict=True), "s--", color="C1", markersize=4, label="plain ranking")
    axes.plot(
        [100 * p.share for p in front], [p.value for p in front], "o-", color="C0", markersize=4, label="best found"
    )
    axes.axhline(dense, linestyle=":", color="black", label="dense")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{kind} left, in %")
    axes.set_ylabel(score)
    low = min([dense, *(p.value for p in front), *(value for _, value in plain)])
    high = max([dense, *(value for _, value, _ in trials)])
    axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def plot_structures(weights: Mapping[str, Tensor], path: Path, most: int = 6) -> None:
    """Draw what is other than zero in some weights, evenly chosen, outputs downwards, kernels summed."""
    names = list(weights)
    names = [
        names[round(i * (len(names) - 1) / max(min(most, len(names)) - 1, 1))] for i in range(min(most, len(names)))
    ]
    figure = Figure(figsize=(2.6 * len(names), 3.0), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        there = (weights[name] != 0).float().flatten(2).mean(2) if weights[name].ndim > 2 else weights[name] != 0
        axes.imshow(there.numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(name.removesuffix(".weight"), fontsize=8)
        axes.set_xlabel("inputs", fontsize=8)
        axes.tick_params(labelsize=6)
    _save(figure, path)


def plot_survey(shares: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw which lines prune well: one row a kind of weight and orientation, one column a depth."""
    depth = max(map(len, shares.values()))
    grid = np.array([[*row, *[np.nan] * (depth - len(row))] for row in shares.values()])
    figure = Figure(figsize=(3.6 + 0.5 * depth, 1.0 + 0.32 * len(shares)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(shares)), list(shares), fontsize=8)
    axes.set_xticks(range(depth))
    axes.set_xlabel("depth")
    figure.colorbar(image, ax=axes, label="share of lines next to nothing")
    _save(figure, path)
