"""The precision that the stand-ins compute in."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """A 16-bit tensor as float32, since torchvision has few 16-bit kernels; any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
