"""What tells weights apart. (On its own, so that a search need not import what trains.)"""

import hashlib

import torch
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """What tells the values of a model's tensors from others."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
