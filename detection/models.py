"""What an MMDetection config gets with ``custom_imports = dict(imports=["sidt.detection.models"])``.

The backbones, the neck and the two hooks are registered, and checkpoints may be safetensors files.
"""

from sidt.detection.backbones import TimmBackbone, sliced_backbone
from sidt.detection.checkpoints import register_safetensors
from sidt.detection.distillation import TeacherHook
from sidt.detection.gates import GateHook
from sidt.detection.pyramid import SimpleFeaturePyramid

__all__ = ["GateHook", "SimpleFeaturePyramid", "TeacherHook", "TimmBackbone", "sliced_backbone"]

register_safetensors()
