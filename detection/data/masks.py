"""COCO segmentations: which of them MMDetection and pycocotools can read. (pycocotools fills the memory with a NaN.)"""

import math
from typing import Any


def is_mask(segmentation: Any, width: float, height: float) -> bool:
    """Whether a segmentation is a mask of an image: polygons of three points or more, or runs that fill the image.

    Args:
        segmentation: polygons, each a list of x and y in turn, or an RLE of ``size`` (height, width) and ``counts``.
        width: of the image, in pixels.
        height: of the image, in pixels.
    """
    if isinstance(segmentation, list):
        return bool(segmentation) and all(_is_polygon(one) for one in segmentation)
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    counts = segmentation.get("counts")
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return False
    return sum(runs) == height * width


def _is_polygon(points: Any) -> bool:
    numbers = isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0
    return numbers and set(map(type, points)) <= {int, float} and all(map(math.isfinite, points))


def _runs(text: str) -> list[int]:
    """The runs of a compressed RLE: numbers of 5 bits a letter, from the third on less the last but one before."""
    runs: list[int] = []
    number = place = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            return []
        number |= (bits & 31) << place
        place += 5
        if bits & 32:  # more of this number follows
            continue
        if bits & 16:
            number -= 1 << place
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = place = 0
    return runs if not place else []
