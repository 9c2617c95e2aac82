"""A detection data set that needs no download: scikit-learn's digits on textured canvases, in COCO's format."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from sidt.errors import InputError
from sidt.files import dump_json, read_json

__all__ = ["write_digits"]

_CARD = "digits.json"  # the parameters of the set, beside it
_FORMAT = 1  # goes up when the same parameters give other images
_VAL_DIGITS = 360  # of the 1,797 digits; the others are for training
_EMPTY_EVERY = 20  # the last of so many images has no digit
_MOST = 8  # digits in an image
_SIDES = 1 / 6, 5 / 12  # the side of a digit, as a part of the canvas: 16 to 40 of 96 pixels
_VISIBLE = 0.9  # at least this part of a digit stays visible under later ones
_DARK, _BRIGHT = (10, 120), (100, 255)  # colours of canvases and of digits
_CONTRAST = 100.0  # least distance in RGB between a digit and what is behind it
_TRIES = 20  # places tried for a digit before it is left out


def write_digits(folder: Path, *, train: int = 2000, val: int = 200, size: int = 96, seed: int = 0) -> str:
    """Write a set of images of digits with COCO instances: boxes, masks and the categories "0" to "9", ids 1 to 10.

    ``folder`` gets ``train/*.png``, ``val/*.png``, ``annotations/train.json``, ``annotations/val.json`` and
    ``digits.json``, all of it or nothing. No handwritten digit is in both splits: ``digit`` of an annotation is its
    number in scikit-learn. Boxes and masks cover the visible pixels. The same arguments give the same bytes.

    Args:
        folder: new or empty, or the same set.
        train: training images.
        val: validation images.
        size: the side of the square images, in pixels.
        seed: of the split of the digits and of the images.

    Returns:
        One line: what was written, or that the set was there.

    Raises:
        InputError: a number is out of range, ``folder`` holds something else or cannot be written to.
    """
    card: dict[str, int] = {"format": _FORMAT, "train": train, "val": val, "size": size, "seed": seed}
    for name, least, most in (("train", 1, 10**6), ("val", 1, 10**6), ("size", 48, 2048), ("seed", 0, 2**63)):
        if type(card[name]) is not int or not least <= card[name] <= most:
            raise InputError(f"{name} is {card[name]!r}; give a whole number from {least} to {most}")
    try:
        if _is_there(folder, card):
            return f"{folder} already holds this set of digits: {train} + {val} images of {size} x {size} pixels"
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            _write_set(temporary, card)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)  # mkdtemp's 0700 would hide the set from other users
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; free some space or choose another folder") from None
    return f"wrote {train} + {val} images of digits, {size} x {size} pixels, to {folder}"


def _is_there(folder: Path, card: dict[str, int]) -> bool:
    """Whether ``folder`` holds the set of ``card``; an error if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = read_json(folder / _CARD) if (folder / _CARD).is_file() else None
    if found == card:
        return True
    if isinstance(found, dict):
        other = ", ".join(
            f"{name} {found.get(name)} not {value}" for name, value in card.items() if found.get(name) != value
        )
        raise InputError(f"{folder} holds another set of digits ({other}); choose another folder or remove it")
    raise InputError(f"{folder} holds something other than digits; choose a new folder")


def _write_set(folder: Path, card: dict[str, int]) -> None:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(card["seed"]).permutation(len(labels))
    (folder / "annotations").mkdir()
    for number, (split, chosen) in enumerate((("train", order[_VAL_DIGITS:]), ("val", order[:_VAL_DIGITS]))):
        (folder / split).mkdir()
        scenes: list[dict[str, Any]] = []
        instances: list[dict[str, Any]] = []
        for index in range(card[split]):
            rng = np.random.default_rng((card["seed"], number, index))  # one image does not depend on the others
            # Empty ones are placed by count, not by chance, so that small sets have their share too.
            count = 0 if index % _EMPTY_EVERY == _EMPTY_EVERY - 1 else int(rng.integers(1, _MOST + 1))
            digits = rng.choice(chosen, count, replace=False)
            canvas, masks = _scene(rng, [images[digit].reshape(8, 8) for digit in digits], card["size"])
            name = f"{index + 1:06d}.png"
            Image.fromarray(canvas).save(folder / split / name)
            scenes.append({"id": index + 1, "file_name": name, "width": card["size"], "height": card["size"]})
            for digit, mask in zip(digits, masks, strict=True):
                if mask is not None:
                    label = {"category_id": int(labels[digit]) + 1, "digit": int(digit)}
                    instances.append({"id": len(instances) + 1, "image_id": index + 1, **label, **_instance(mask)})
        whole = {
            "info": {"description": "scikit-learn's digits on textured canvases", **card},
            "licenses": [],
            "images": scenes,
            "annotations": instances,
            "categories": [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)],
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / _CARD).write_text(dump_json(card), encoding="utf-8")


def _scene(rng: np.random.Generator, digits: list[np.ndarray], size: int) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """An image, size x size x 3 uint8, and the visible pixels of each digit in it, size x size bool.

    None stands for a digit that found no place. The first digit lies at the bottom.
    """
    canvas = _texture(rng, size)
    masks: list[np.ndarray | None] = []
    areas: list[int] = []
    for digit in digits:
        stroke = _stroke(rng, digit, size)
        alpha = _placed(rng, stroke, size, masks, areas)
        areas.append(int((stroke >= 0.5).sum()))
        if alpha is None:
            masks.append(None)
            continue
        mask = alpha >= 0.5
        behind = canvas[mask].mean(axis=0)
        colour = rng.uniform(*_BRIGHT, 3)
        while np.linalg.norm(colour - behind) < _CONTRAST:
            colour = rng.uniform(*_BRIGHT, 3)
        canvas += alpha[..., None] * (colour - canvas)
        masks = [old if old is None else old & ~mask for old in masks] + [mask]
    canvas += rng.normal(0, rng.uniform(0, 10), canvas.shape)  # grain, over digits too
    return canvas.clip(0, 255).astype(np.uint8), masks


def _placed(
    rng: np.random.Generator, stroke: np.ndarray, size: int, masks: list[np.ndarray | None], areas: list[int]
) -> np.ndarray | None:
    """The opacity of a digit over the canvas, where it leaves enough of the earlier ones; None: nowhere found."""
    height, width = stroke.shape
    for _ in range(_TRIES):
        top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
        alpha = np.zeros((size, size))
        alpha[top : top + height, left : left + width] = stroke
        rest = ((old & (alpha < 0.5)).sum() / area for old, area in zip(masks, areas, strict=True) if old is not None)
        if all(part >= _VISIBLE for part in rest):
            return alpha
    return None


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Two colours mixed by a gradient, stripes and noise of several scales: size x size x 3, around 0..255."""
    rows, columns = np.mgrid[:size, :size] / size
    tilt, turn = rng.uniform(0, 2 * math.pi, 2)
    gradient = math.cos(tilt) * rows + math.sin(tilt) * columns
    across = math.cos(turn) * rows + math.sin(turn) * columns
    stripes = np.sin(2 * math.pi * (rng.uniform(2, 12) * across + rng.uniform()))
    octaves = [_resized(rng.normal(size=(2**k, 2**k)), (size, size)) * 0.6**k for k in range(1, 6)]
    fields = np.stack([gradient, stripes, np.sum(octaves, axis=0)])
    fields = (fields - fields.mean(axis=(1, 2), keepdims=True)) / fields.std(axis=(1, 2), keepdims=True)
    mix = np.tensordot(rng.dirichlet((1, 0.5, 1)), fields, 1)
    contrast = rng.uniform(-1, 1, 3) * rng.uniform(10, 45)
    texture: np.ndarray = rng.uniform(*_DARK, 3) + contrast * mix[..., None]
    return texture


def _stroke(rng: np.random.Generator, digit: np.ndarray, size: int) -> np.ndarray:
    """The opacity of a digit, 0..1, scaled, stretched and turned a little, cut to the box of its pixels."""
    side = size * math.exp(rng.uniform(math.log(_SIDES[0]), math.log(_SIDES[1])))
    stretch = math.exp(rng.uniform(-0.15, 0.15))
    padded = np.pad(digit / digit.max(), 1)  # strokes touch the edge of the 8 x 8 pixels
    shape = round(side * stretch * 10 / 8), round(side / stretch * 10 / 8)
    turned = Image.fromarray(_resized(padded, shape)).rotate(
        float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC, expand=True
    )
    opacity = ((np.asarray(turned) - 0.3) / 0.4).clip(0, 1)  # sharper than the upscaled 8 x 8 pixels
    rows, columns = (np.flatnonzero((opacity >= 0.5).any(axis=axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _resized(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(values.astype(np.float32)).resize(shape[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image)


def _instance(mask: np.ndarray) -> dict[str, Any]:
    """Box, area and mask of COCO: x, y, width, height, and run lengths down the columns that begin with zeros."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    flat = np.concatenate([[False], mask.ravel(order="F"), [not mask[-1, -1]]])
    runs = np.diff(np.flatnonzero(np.diff(flat)), prepend=0)
    return {
        "bbox": [int(value) for value in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": runs.tolist()},
    }
