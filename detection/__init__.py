"""MMDetection's side of SiDT: the only package that imports mmdet, mmcv and mmengine."""
