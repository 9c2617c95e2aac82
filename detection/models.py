"""What an MMDetection config gets with ``custom_imports = dict(imports=["sidt.detection.models"])``.

The backbones, the neck and the three hooks are registered, and checkpoints may be safetensors files.
"""

from sidt.detection.detectors.checkpoints import register_safetensors
from sidt.detection.detectors.sliced_parts import sliced_part

__all__ = [
    *("GateHook", "SimpleFeaturePyramid", "StructuresHook", "TeacherHook", "TimmBackbone", "sliced_backbone"),
    "sliced_part",
]

register_safetensors()
