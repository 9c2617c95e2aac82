"""What an MMDetection config gets with ``custom_imports = dict(imports=["sidt.detection.models"])``.

The backbones and the neck are registered, and checkpoints may be safetensors files.
"""

from sidt.detection.backbones import TimmBackbone, sliced_backbone
from sidt.detection.checkpoints import register_safetensors
from sidt.detection.pyramid import SimpleFeaturePyramid

__all__ = ["SimpleFeaturePyramid", "TimmBackbone", "sliced_backbone"]

register_safetensors()
