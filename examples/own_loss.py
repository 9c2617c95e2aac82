"""A regression: how much ink an image has. The loss and the search's objective are functions of one's own."""

import argparse
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sidt
from sidt.data import DataConfig, load_data
from sidt.training import make_loader


def errors(model: nn.Module, images: Tensor, ink: Tensor) -> Tensor:
    """[B, 3, H, W], [B] -> [B]: the squared error of each image."""
    return (model(images)[:, 0] - ink) ** 2


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean error of a batch, which may be anything that this function takes."""
    return errors(model, batch["image"], batch["ink"]).mean()


def main(epochs: int, trials: int) -> None:
    """Train, score by the loss, search by the objective, and say what it gained."""
    torch.manual_seed(0)
    images = torch.stack([image for image, _ in load_data(DataConfig(name="digits", image_size=16)).calibration])
    train, held_out, fresh = (
        TensorDataset(part, part.mean((1, 2, 3))) for part in (images[:900], images[900:1020], images[1020:])
    )
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=1
    )
    sidt.finetune(model, train, epochs=epochs, lr=2e-3, loss=lambda *given: errors(*given).mean())
    batches = [{"image": images, "ink": ink} for images, ink in make_loader(train, 64)]

    def objective(candidate: nn.Module, data: TensorDataset = held_out) -> Iterator[Tensor]:
        for images, ink in make_loader(data, 60):
            yield -errors(candidate, images, ink)

    aligned, moments = sidt.align(model, sidt.measure_moments(model, batches, forward=loss))
    scores = sidt.importance.taylor(aligned, batches, loss, space=moments.space)
    found = sidt.search(
        aligned,
        scores,
        sidt.Budget(params=0.2),
        objective,
        fresh=lambda candidate: objective(candidate, fresh),
        slicer=lambda plan: sidt.compensate(aligned, plan, moments),
        trials=trials,
    )
    small = sidt.compensate(aligned, found.plan, moments)
    print(found.gain.sentence("{:+.4f}", "{:.4f}", "fresh images"))
    with torch.no_grad():
        for name, each in {"dense": model, "small": small}.items():
            print(f"{name}: squared error {errors(each.eval(), *fresh.tensors).mean():.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--trials", type=int, default=15)
    main(**vars(parser.parse_args()))
