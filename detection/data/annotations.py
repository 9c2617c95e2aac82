"""COCO annotation files: what is wrong with one, before a detector meets it, and how to split one."""

import gc
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from sidt.detection.data.masks import is_mask
from sidt.errors import InputError
from sidt.files import read_json, write_bytes

# What is read from each entry, here, by MMDetection and by pycocotools.
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": int, "file_name": str, "width": (int, float), "height": (int, float)},
    "categories": {"id": int, "name": str},
    "annotations": {
        "id": int,
        "image_id": int,
        "category_id": int,
        "bbox": list,
        "area": (int, float),
        "iscrowd": int,
    },
}


@dataclass(frozen=True)
class Summary:
    """What an annotation file holds.

    Args:
        images: number of images.
        boxes: boxes to detect.
        crowd: boxes around a crowd, which neither training nor evaluation ask for.
        dropped: boxes that MMDetection drops in training: below 1 pixel, of no area, outside of the image, or
            marked ``ignore``.
        empty_images: images without a box to detect.
        categories: categories of the detector: those of ``classes`` if they were given, else all of the file.
    """

    images: int
    boxes: int
    crowd: int
    dropped: int
    empty_images: int
    categories: int


@contextmanager
def _without_collection() -> Iterator[None]:
    """While the block makes millions of objects that all stay, nobody looks for those that could go."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collection()
def read_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO instances file.

    Raises:
        InputError: it is missing, not JSON, not of that format, repeats an id, or points to images or categories
            that are not in it.
    """
    data = _parsed(path)
    _check(path, data)
    return data


def _parsed(path: Path) -> Any:
    try:
        text = path.read_bytes()
        data = orjson.loads(text)
        # Of two equal keys, orjson takes the last: the text then has a colon more. One may be written as an escape.
        as_read = text.count(b":") == _colons(data) and b"\\u003" not in text
    except (OSError, orjson.JSONDecodeError, RecursionError):
        as_read = False
    return data if as_read else read_json(path)  # says what is wrong; of NaN, which JSON has not, what it is in


def _colons(value: Any) -> int:
    """The colons in the text of a JSON value, but those in keys and in lists that begin with a number."""
    kind = type(value)
    if kind is dict:
        return len(value) + sum(_colons(part) for part in value.values() if type(part) in _HOLDERS)
    if kind is list:
        return sum(map(_colons, value)) if value and type(value[0]) in _HOLDERS else 0
    return value.count(":") if kind is str else 0


_HOLDERS = (str, list, dict)


def _check(path: Path, data: Any) -> None:
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in _FIELDS):
        seen = f"the keys {', '.join(map(str, data)) or '(none)'}" if isinstance(data, dict) else type(data).__name__
        raise InputError(
            f"{path} is not a COCO instances file, which holds lists of images, annotations and categories: "
            f"it holds {seen}; give an instances_*.json"
        )
    ids = {part: _check_entries(path, part, data[part]) for part in _FIELDS}
    annotations = data["annotations"]
    known = ({a["image_id"] for a in annotations} <= ids["images"]) and (
        {a["category_id"] for a in annotations} <= ids["categories"]
    )
    if known and _are_boxes([a["bbox"] for a in annotations]):
        return
    for annotation in annotations:  # which it is
        for part, key in (("images", "image_id"), ("categories", "category_id")):
            if annotation[key] not in ids[part]:
                raise InputError(
                    f"{path}: annotation {annotation['id']} has {key} {annotation[key]}, "
                    f"which is not among the {len(ids[part])} {part}; remove the annotation or add the entry"
                )
        box = annotation["bbox"]
        if len(box) != 4 or not all(_is_number(value) for value in box):
            raise InputError(
                f"{path}: annotation {annotation['id']} has the bbox {json.dumps(box)[:80]}; "
                "write 4 finite numbers: x, y, width, height, in pixels"
            )


@_without_collection()
def check_annotations(
    path: Path, images: Path | None = None, classes: Sequence[str] | None = None, *, masks: bool = False
) -> Summary:
    """Check a COCO instances file for a detector, and count what it holds.

    Images without boxes, crowds, boxes of no area, categories that nobody uses and more categories than
    ``classes`` are all legal.

    Args:
        path: the annotation file.
        images: the folder that its file names are in; without it, image files are not looked for.
        classes: the detector's classes, in its order; without them, all categories of the file.
        masks: whether the detector has masks.

    Raises:
        InputError: the file cannot be read (see ``read_annotations``); image files are missing; the file's
            categories are not the detector's; there are no images, or no boxes; masks are needed and missing or none.
    """
    data = read_annotations(path)
    if not data["images"]:
        raise InputError(f"{path} holds no image; give a file with images and boxes")
    if images is not None:
        _check_files(path, images, [image["file_name"] for image in data["images"]])
    categories = category_ids(path, data, classes)
    known = set(categories)
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    of_classes = [a for a in data["annotations"] if a["category_id"] in known]
    crowd = [a for a in of_classes if a["iscrowd"]]
    kept = _kept(of_classes, sizes)
    boxes = [a for a in kept if not a["iscrowd"]]
    if not boxes:
        raise InputError(
            f"{path} has no box to detect: of its {len(data['annotations'])} annotations, {len(of_classes)} are of the "
            f"{len(categories)} classes, {len(crowd)} of those are crowds and {len(of_classes) - len(crowd)} are below "
            "1 pixel or outside of their images; boxes are x, y, width, height, in pixels"
        )
    if masks:
        bare = [a for a in kept if not a.get("segmentation")]  # crowds too: MMDetection loads their masks
        if bare:
            raise InputError(
                f"{path}: {len(bare)} of {len(kept)} annotations have no segmentation, {bare[0]['id']} first; "
                "use a detector without masks, or annotations with them"
            )
        strange = [a for a in kept if not is_mask(a["segmentation"], *sizes[a["image_id"]])]
        if strange:
            width, height = sizes[strange[0]["image_id"]]
            raise InputError(
                f"{path}: {len(strange)} of {len(kept)} segmentations are no masks, first that of annotation "
                f"{strange[0]['id']}, {json.dumps(strange[0]['segmentation'])[:80]}; write polygons of 3 points or "
                f"more, each x and y, or an RLE of size [{height}, {width}] whose counts fill it"
            )
    return Summary(
        images=len(data["images"]),
        boxes=len(boxes),
        crowd=len(crowd),
        dropped=len(of_classes) - len(crowd) - len(boxes),
        empty_images=len(data["images"]) - len({a["image_id"] for a in boxes}),
        categories=len(categories),
    )


def category_ids(path: Path, data: dict[str, Any], classes: Sequence[str] | None) -> list[Any]:
    """The file's ids of a detector's classes, by label: MMDetection's ``cat_ids``.

    Args:
        path: the annotation file, for messages.
        data: what ``read_annotations`` gave.
        classes: names in the order of the detector's labels; None stands for all categories of the file.

    Raises:
        InputError: a class is not a category of the file, or is so twice, or they are in another order.
    """
    names = [category["name"] for category in data["categories"]]
    if classes is None:
        return [category["id"] for category in data["categories"]]
    missing = [name for name in classes if name not in names]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of the detector's {len(classes)} classes: {_some(missing)}; it has "
            f"{_some(names)}; MMDetection matches classes by name and drops the rest without a word: give the dataset "
            f"metainfo=dict(classes=...) of the file's names, and the head as many num_classes"
        )
    found = [category for category in data["categories"] if category["name"] in set(classes)]
    if [category["name"] for category in found] != list(classes):
        raise InputError(
            f"{path} has the classes as {_some(c['name'] for c in found)}, and the detector as {_some(classes)}; "
            "MMDetection numbers them as in the file: have each name once, and all files and "
            "metainfo=dict(classes=...) in one order"
        )
    return [category["id"] for category in found]


@_without_collection()
def write_subsets(
    path: Path, folder: Path, *, held: float | int, seed: int, classes: Sequence[str] | None = None
) -> dict[str, Path]:
    """Split the images of a COCO file: two held-out parts and the rest, each a COCO file of its own.

    The held-out images are drawn among those with a box of the detector's classes that MMDetection keeps. All else in
    the file, its categories above all, is in all three.

    Args:
        path: the annotation file.
        folder: where ``rest.json``, ``holdout.json`` and ``fresh.json`` are written.
        held: images in each of ``holdout`` and ``fresh``: a number, or, if below 0.5, a fraction: of all images, or,
            where the detector knows only some of the file's categories, of those with boxes of them.
        seed: of the draw, which is the same every time.
        classes: the detector's; without them, all categories of the file.

    Returns:
        The three paths, by ``rest``, ``holdout`` and ``fresh``.

    Raises:
        InputError: the file cannot be read, has too few images with boxes, or ``held`` is out of range.
    """
    data = read_annotations(path)
    if not (0 < held < 0.5 or (held >= 1 and held == int(held))):
        raise InputError(f"held is {held}; give a fraction of the images below 0.5, or a number of images from 1")
    known = set(category_ids(path, data, classes))
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    asked = [a for a in data["annotations"] if a["category_id"] in known and not a["iscrowd"]]
    with_boxes = {a["image_id"] for a in _kept(asked, sizes)}
    some = len(known) < len(data["categories"])
    count = int(held) if held >= 1 else round(held * (len(with_boxes) if some else len(data["images"])))
    if not 0 < count * 2 < len(with_boxes):
        raise InputError(
            f"cannot hold out twice {count} images of {path} (held is {held}): it has {len(data['images'])} images, "
            f"{len(with_boxes)} with boxes{' of the classes' if some else ''}, and some must be left; change held or "
            f"give more images"
        )
    candidates = [image["id"] for image in data["images"] if image["id"] in with_boxes]
    drawn = [candidates[i] for i in np.random.default_rng(seed).permutation(len(candidates))[: 2 * count]]
    part_of = dict.fromkeys(drawn[:count], "holdout") | dict.fromkeys(drawn[count:], "fresh")
    written = {}
    for part in ("rest", "holdout", "fresh"):
        subset = data | {
            "images": [image for image in data["images"] if part_of.get(image["id"], "rest") == part],
            "annotations": [a for a in data["annotations"] if part_of.get(a["image_id"], "rest") == part],
        }
        written[part] = folder / f"{part}.json"
        write_bytes(written[part], orjson.dumps(subset))  # compact: COCO's own is 450 MB
    return written


# --- details ------------------------------------------------------------------------------------------------------


def _check_entries(path: Path, part: str, entries: list[Any]) -> set[Any]:
    """Check the fields of every entry, and that no id is there twice. Returns the ids."""
    if _are_right(part, entries):
        ids = {entry["id"] for entry in entries}
        if len(ids) == len(entries):
            return ids
    ids = set()
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {part}[{place}] is {json.dumps(entry)[:80]}; every entry must be an object")
        for field, kinds in _FIELDS[part].items():
            value = entry.get(field)
            if not isinstance(value, kinds) or (isinstance(value, float) and not math.isfinite(value)):
                seen = f"the {field} {json.dumps(value)[:80]}" if field in entry else f"no {field}"
                raise InputError(f"{path}: {part}[{place}] has {seen}; write it as COCO's instances files do")
        if entry["id"] in ids:
            raise InputError(f"{path}: the id {entry['id']} is there twice among the {part}; make them unique")
        ids.add(entry["id"])
    return ids


def _check_files(path: Path, images: Path, names: Sequence[str]) -> None:
    """Check that all image files are there. Folders are listed once: asking for each of 118k files takes minutes."""
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, file = os.path.split(os.path.join(images, name))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file not in listed[folder]:
            missing.append(name)
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(names)} images of {path} are not in {images}, {missing[0]} first"
            f"{'' if images.is_dir() else ' (there is no such folder)'}; "
            "give the folder that the file names are relative to, or complete it"
        )


def _are_right(part: str, entries: list[Any]) -> bool:
    """Whether all entries have all fields, of their kinds: a column at a time, since COCO has a million entries."""
    if not set(map(type, entries)) <= {dict}:
        return False
    for field, kinds in _FIELDS[part].items():
        column = [entry.get(field) for entry in entries]
        found = set(map(type, column))
        if not all(issubclass(kind, kinds) for kind in found) or (float in found and not _are_finite(column)):
            return False
    return True


def _are_boxes(boxes: list[list[Any]]) -> bool:
    numbers = list(chain.from_iterable(boxes))
    return set(map(len, boxes)) <= {4} and set(map(type, numbers)) <= {int, float} and _are_finite(numbers)


def _are_finite(numbers: list[Any]) -> bool:
    return bool(np.isfinite(np.asarray(numbers, dtype=np.float64)).all())


def _kept(annotations: list[Any], sizes: dict[Any, tuple[float, float]]) -> list[Any]:
    """The annotations whose boxes MMDetection's ``CocoDataset`` keeps."""
    if not annotations:
        return []
    boxes: npt.NDArray[np.float64] = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    limits = np.array([sizes[a["image_id"]] for a in annotations], dtype=np.float64)
    area = np.array([a["area"] for a in annotations], dtype=np.float64)
    start, size = boxes[:, :2], boxes[:, 2:]
    inside = np.minimum(start + size, limits) > np.maximum(start, 0)
    keeps = (area > 0) & (size >= 1).all(axis=1) & inside.all(axis=1)
    return [a for a, keep in zip(annotations, keeps.tolist(), strict=True) if keep and not a.get("ignore")]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _some(names: Iterable[str], most: int = 8) -> str:
    """A list of names, short enough for one line."""
    listed = [repr(name) for name in names]
    return ", ".join(listed[:most]) + (f", ... ({len(listed)})" if len(listed) > most else "") or "none"
