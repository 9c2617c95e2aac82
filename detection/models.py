"""What an MMDetection config gets with ``custom_imports = dict(imports=["sidt.detection.models"])``.

The backbones, the neck, sliced necks and heads, and the three hooks are registered, and checkpoints may be safetensors
files.
"""

from sidt.detection.detectors.backbones import TimmBackbone, sliced_backbone
from sidt.detection.detectors.checkpoints import register_safetensors
from sidt.detection.detectors.pyramid import SimpleFeaturePyramid
from sidt.detection.detectors.sliced_parts import sliced_part
from sidt.detection.training.distillation import TeacherHook
from sidt.detection.training.gates import GateHook
from sidt.detection.training.structures import StructuresHook

__all__ = [
    "GateHook",
    "SimpleFeaturePyramid",
    "StructuresHook",
    "TeacherHook",
    "TimmBackbone",
    "sliced_backbone",
    "sliced_part",
]

register_safetensors()
