"""A classifier, trained on digits, then shrunk to a fifth of its parameters, fine-tuned, saved and loaded."""

import argparse
from pathlib import Path

import timm
import torch

import sidt
from sidt.data import DataConfig, load_data
from sidt.training import make_loader, top1


def main(folder: Path, epochs: int) -> None:
    """Train for some epochs, shrink, fine-tune for a quarter of them, and leave the small model in a folder."""
    torch.manual_seed(0)
    data = load_data(DataConfig(name="digits"))
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=10
    )
    sidt.finetune(model, data.train, epochs=epochs, batch_size=32, lr=2e-3)
    print(f"dense: {top1(model, data.test):.1%}")

    small = sidt.shrink(model, make_loader(data.calibration, 64), sidt.Budget(params=0.2))
    print(small)
    print(f"sliced and repaired: {top1(small.model, data.test):.1%}")

    loss = sidt.distillation_loss(model, small.model)
    sidt.finetune(small.model, data.train, epochs=epochs // 4, lr=3e-4, loss=loss)
    print(f"fine-tuned: {top1(small.model, data.test):.1%}")

    sidt.save(small.model, folder)
    again = sidt.load(folder)
    print(f"{folder}: {sum(p.numel() for p in again.parameters()):,} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/example"))
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
