"""One study over all budgets: the curve of log-likelihood against parameters, where it bends, and a model off it."""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch

import sidt
from sidt.allocation import knees, nearest, plan_at
from sidt.data import DataConfig, load_data
from sidt.training import log_likelihood, make_loader, top1


def main(picture: Path, epochs: int, trials: int) -> None:
    """Train, search, draw the curve, and slice at its last bend."""
    torch.manual_seed(0)
    data = load_data(DataConfig(name="digits"))
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=10
    )
    sidt.finetune(model, data.train, epochs=epochs, batch_size=32, lr=2e-3)
    batches = make_loader(data.calibration, 64)
    base, moments = sidt.align(model, sidt.measure_moments(model, batches))
    scores = sidt.importance.taylor(base, batches, space=moments.space)
    found = sidt.search(
        base,
        scores,
        sidt.Budget(params=0.1),  # the kind of budget, and what the plan that comes back is of
        lambda candidate: log_likelihood(candidate, data.holdout),
        slicer=lambda plan: sidt.compensate(base, plan, moments),
        trials=trials,
        pareto=True,
    )
    for point in found.front:
        print(f"{point.share:.1%} of the parameters: {point.value:.3f}")
    figure, axis = plt.subplots(layout="constrained")
    axis.plot([point.share for point in found.front], [point.value for point in found.front], "o-")
    axis.set(xscale="log", xlabel="part of the parameters", ylabel="log-likelihood on held-out images")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)

    bend = (knees(found.front) or [nearest(found.front, 0.1)])[0]
    small = sidt.compensate(base, plan_at(scores, sidt.Budget(params=bend.share), bend.knobs), moments)
    print(f"at {bend.share:.1%}: {top1(small, data.test):.1%}, dense {top1(model, data.test):.1%}; curve -> {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("runs/curve.png"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--trials", type=int, default=40)
    main(**vars(parser.parse_args()))
