"""MMDetection's side of SiDT: the only package that imports mmdet, mmcv and mmengine."""

from sidt.detection.operators import provide

# Here, since MMDetection's modules import mmcv.ops when they are imported, before any custom import of a config.
provide()
