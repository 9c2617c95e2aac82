"""What stands in for MMDetection's projects/ViTDet, which no package installs: the same names, shapes and sums."""

from .pyramid import SimpleFPN
from .vit import ViT

__all__ = ["SimpleFPN", "ViT"]
