"""What each process of test_processes.py runs: three epochs of a tiny ViT, its history and weights to a folder."""

import json
import os
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from sidt.training.loop import TrainConfig, fit

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=4
    )
    data = TensorDataset(torch.randn(48, 3, 16, 16), torch.arange(48) % 4)
    config = TrainConfig(epochs=3, batch_size=8, lr=0.02, opt="sgd", smoothing=0.0, device="cpu")
    history = fit(model, data, config, folder=folder / "state")
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "history.json").write_text(json.dumps(history))
