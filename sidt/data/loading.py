"""The data sets: digits (embedded in scikit-learn), CIFAR-100, image folders and tars.

Every item is an image, float 3 x H x W and normalised, and its label, an int.
"""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from sidt.data.pixels import ImageData, Pixels
from sidt.data.preparation import Augmentation, DataConfig, Preparation, preparation_of
from sidt.data.sources import Files, broken
from sidt.data.splits import parts_of
from sidt.errors import InputError

_AUGMENT: dict[str, Augmentation] = {"digits": "crop", "cifar100": "crop-flip", "folder": "imagenet"}
# Crops shift by up to this part of the side. Digits have 8 real pixels a side: an eighth cuts strokes off.
_SHIFT = {"digits": 1 / 16, "cifar100": 1 / 8, "folder": 1 / 8}


@dataclass(frozen=True)
class Splits:
    """The parts of a data set. None overlaps another, except that calibration is train, unaugmented.

    Attributes:
        train: augmented.
        calibration: the images of train as they are; importance is measured on them.
        holdout: the search's objective.
        fresh: for judging what the search found.
        test: for the final evaluation only.
        classes: the class names, in the order of the labels; none: there are no labels.
        rows: which of all classes of the data set these are, where some were chosen.
        known: all classes of the data set.
    """

    train: ImageData
    calibration: ImageData
    holdout: ImageData
    fresh: ImageData
    test: ImageData
    classes: tuple[str, ...]
    rows: tuple[int, ...] | None = None
    known: tuple[str, ...] = ()


def load_data(config: DataConfig) -> Splits:
    """Load and split a data set.

    Raises:
        InputError: the data is not there, not readable, has no image, or too few of a class to be split.
    """
    if not 0 < config.holdout < 0.5:
        raise InputError(f"holdout is {config.holdout:g}; it must lie between 0 and 0.5: as much again is kept fresh")
    how = preparation_of(config)
    size, mean, std = how.size, how.mean, how.std
    augment = config.augment or _AUGMENT[config.name]
    if min(std) <= 0:
        raise InputError(f"std is {std}; every channel's must be above 0")
    view: Callable[[Image.Image], Tensor] = create_transform(
        (3, *size),
        interpolation=how.interpolation,
        crop_pct=how.crop_pct,
        crop_mode=how.crop_mode,
        mean=mean,  # of borders
        normalize=False,
    )
    parts = parts_of(config)
    everything, training, tested = parts.source, parts.train, parts.test
    pixels = Pixels(everything, view, size)
    test_pixels = pixels if parts.test_source is everything else Pixels(parts.test_source, view, size)
    random_view = _imagenet(how) if augment == "imagenet" else augment
    shift = tuple(max(1, round(side * _SHIFT[config.name])) for side in size)
    return Splits(
        train=ImageData(pixels, training[0], mean, std, random_view, (shift[0], shift[1])),
        calibration=ImageData(pixels, training[0], mean, std),
        holdout=ImageData(pixels, training[1], mean, std),
        fresh=ImageData(pixels, training[2], mean, std),
        test=ImageData(test_pixels, tested, mean, std),
        classes=everything.classes,
        rows=parts.rows,
        known=parts.known,
    )


def broken_images(data: Splits) -> list[str]:
    """The names of the images that cannot be decoded. All are read."""
    sources = {id(part.pixels): part.pixels.source for part in (data.train, data.test)}
    return [
        str(source.path / source.files[index].name)
        for source in sources.values()
        if isinstance(source, Files)
        for index, _ in broken(source)
    ]


def _imagenet(how: Preparation) -> Callable[[Image.Image], Tensor]:
    """DeiT's augmentation."""
    transform: Callable[[Image.Image], Tensor] = create_transform(
        how.size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation=how.interpolation,
        re_prob=0.25,
        re_mode="pixel",
        mean=how.mean,
        std=how.std,
    )
    return transform
