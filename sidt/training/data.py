"""The data sets: digits (embedded in scikit-learn), CIFAR-100, image folders and tars.

Every item is an image, float 3 x S x S and normalised, and its label, an int.
"""

import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR100
from torchvision.transforms import v2

from sidt.errors import InputError

Augmentation = Literal["none", "crop", "crop-flip", "imagenet"]

_AUGMENT: dict[str, Augmentation] = {"digits": "crop", "cifar100": "crop-flip", "folder": "imagenet"}
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3053, 0.3053, 0.3053), (0.3457, 0.3457, 0.3457)),  # of the training images at 32 x 32
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
# Crops shift by up to this part of the side. Digits have 8 real pixels a side: an eighth cuts strokes off.
_SHIFT = {"digits": 1 / 16, "cifar100": 1 / 8, "folder": 1 / 8}
_LAYOUTS = "a folder with train/ and val/ (or test/), or with train.tar and val.tar (or test.tar)"
_CACHE_BYTES = 2**29  # decoded images of one source are kept in memory up to this size


class DataConfig(BaseModel):
    """Which data, how it is split and how it is augmented.

    Attributes:
        name: ``digits`` needs no file, ``folder`` is any data set in one of the two layouts of ``root``.
        root: a folder with ``train/`` and ``val/`` (or ``test/``), a folder per class in each, or with
            ``train.tar`` and ``val.tar`` (or ``test.tar``). For ``cifar100`` also torchvision's location.
        image_size: S, in pixels.
        holdout: the part of the training data held out for the search; as much again is kept fresh.
        mean: per channel, of pixels in 0..1; None: the data set's own.
        std: likewise.
        augment: of the training images; None: crop (random shifts) for digits, crop-flip for CIFAR-100,
            imagenet (DeiT's) for folders.
        download: whether CIFAR-100 may be downloaded when ``root`` has no copy.
        seed: of the train / holdout / fresh split. The test set does not depend on it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["digits", "cifar100", "folder"] = "digits"
    root: Path | None = None
    image_size: int = Field(default=32, ge=1)
    holdout: float = 0.1  # load_data checks it: a one-line error for Python users too
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    augment: Augmentation | None = None
    download: bool = True
    seed: int = Field(default=0, ge=0)


class DataError(InputError):
    """An image cannot be read. Raised while reading, also in a worker of a DataLoader."""

    def __init__(self, message: str) -> None:  # noqa: D107
        # torch re-raises a worker's exception with the traceback as its message: keep the line that matters.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: "))


class _Arrays:
    """Images in memory, N x H x W x 3 uint8."""

    def __init__(self, arrays: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> None:
        self.arrays, self.labels, self.classes = arrays, np.asarray(labels, dtype=np.int64), tuple(classes)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])


class _Files:
    """Images in a folder or a tar, a folder per class; labels follow the sorted class names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix == ".tar":
            _check_tar_end(path)
        try:
            self.reader = create_dataset("", root=str(path), search_split=False).reader
        except (tarfile.TarError, EOFError, OSError) as error:
            raise InputError(f"cannot read {path}: {error}; it is damaged or cut short: copy it again") from None
        except (ValueError, RuntimeError):  # timm: no image in the tar; no image in the folder
            raise InputError(f"{path} holds no images; expected {path.stem}/<class>/<image> files") from None
        found = getattr(self.reader, "class_to_idx", None) or self.reader.class_name_to_idx
        self.classes = tuple(sorted(found))
        if "" in found:
            raise InputError(f"{path} holds images outside of any class folder; expected <class>/<image> files")
        # timm orders classes naturally (2 before 10); torchvision and most checkpoints order them as text.
        order = {found[name]: label for label, name in enumerate(self.classes)}
        targets = getattr(self.reader, "targets", None)
        if targets is None:
            targets = [target for _, target in self.reader.samples]
        self.labels = np.array([order[int(target)] for target in targets], dtype=np.int64)
        self.pid = os.getpid()

    def read(self, index: int) -> Image.Image:
        if self.pid != os.getpid():  # a forked worker would share the offset in the parent's open tar
            self._close()
        try:
            # Not through timm's ImageDataset: it would put the next image in place of one it cannot decode.
            with self.reader[index][0] as file, Image.open(file) as image:
                picture: Image.Image = image.convert("RGB")
                return picture
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            name = self.reader.filename(index)
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):  # its own text is the repr of the open file
                reason = "no known image format"
            raise DataError(f"cannot decode {name} in {self.path}: {reason}; remove or replace it") from None

    def _close(self) -> None:
        if hasattr(self.reader, "tar_state"):
            self.reader.tar_state.reset()
            self.reader.tar_state.children.clear()
        self.pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:  # open files cannot go to a spawned worker
        self._close()
        return self.__dict__


def _check_tar_end(path: Path) -> None:
    # tarfile takes an archive cut between two members for a complete one: look for its closing zeros.
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 512))
            tail = file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    if len(tail) < 512 or any(tail):
        raise InputError(f"cannot read {path}: no end-of-archive mark; it is damaged or cut short: copy it again")


class _Pixels:
    """The images of a source as uint8 3 x S x S, each decoded once if all of them fit into memory."""

    def __init__(self, source: _Arrays | _Files, view: Callable[[Image.Image], Tensor], size: int) -> None:
        self.source, self.view = source, view
        count = len(source.labels)
        keep = count * 3 * size * size <= _CACHE_BYTES
        self.cache = torch.empty(count, 3, size, size, dtype=torch.uint8) if keep else None
        self.known = torch.zeros(count, dtype=torch.bool)

    def get(self, indices: Tensor) -> Tensor:
        if self.cache is None:
            return torch.stack([self.view(self.source.read(i)) for i in indices.tolist()])
        for i in indices[~self.known[indices]].tolist():
            self.cache[i] = self.view(self.source.read(i))
            self.known[i] = True
        return self.cache[indices]


class ImageData(Dataset[tuple[Tensor, int]]):
    """Some images of a source, with or without augmentation.

    Attributes:
        classes: the class names, in the order of the labels.
        labels: int64, the label of every item; nothing is decoded to know it.
        indices: int64, where every item lies in its source (training file or test file).
    """

    def __init__(  # noqa: D107
        self,
        pixels: _Pixels,
        indices: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Literal["none", "crop", "crop-flip"] | Callable[[Image.Image], Tensor] = "none",
        shift: int = 0,
    ) -> None:
        self.pixels, self.indices = pixels, np.asarray(indices, dtype=np.int64)
        self.augment, self.shift = augment, shift
        self.labels, self.classes = pixels.source.labels[self.indices], pixels.source.classes
        self._scale = 1 / (255 * torch.tensor(std)).view(3, 1, 1)
        self._shift = -(torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image, float 3 x S x S, and label."""
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Several items at once: torch's loaders call this, and small images are fast only so."""
        where = self.indices[indices]
        labels: list[int] = self.labels[indices].tolist()
        if callable(self.augment):
            return [(self.augment(self.pixels.source.read(int(i))), n) for i, n in zip(where, labels, strict=True)]
        images = self.pixels.get(torch.from_numpy(where))
        if self.augment != "none":
            images = _crop(images, self.shift, flip=self.augment == "crop-flip")
        return list(zip((images * self._scale + self._shift).unbind(), labels, strict=True))


def _crop(images: Tensor, pad: int, *, flip: bool) -> Tensor:
    """Shift every image by up to ``pad`` pixels, black coming in, and mirror half of them."""
    count, _, size, _ = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    offset = torch.randint(2 * pad + 1, (2, count, 1))
    rows, columns = offset + torch.arange(size)
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    everyone = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[everyone, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Splits:
    """The parts of a data set. None overlaps another, except that calibration is train, unaugmented.

    Attributes:
        train: augmented.
        calibration: the images of train as they are; importance is measured on them.
        holdout: the search's objective.
        fresh: for judging what the search found.
        test: for the final evaluation only.
        classes: the class names, in the order of the labels.
    """

    train: ImageData
    calibration: ImageData
    holdout: ImageData
    fresh: ImageData
    test: ImageData
    classes: tuple[str, ...]


def load_data(config: DataConfig) -> Splits:
    """Load and split a data set.

    Raises:
        InputError: the data is not there, not readable, has no image, or too few of a class to be split.
    """
    if not 0 < config.holdout < 0.5:
        raise InputError(f"holdout is {config.holdout:g}; it must lie between 0 and 0.5: as much again is kept fresh")
    augment = config.augment or _AUGMENT[config.name]
    mean, std = (
        own or default for own, default in zip((config.mean, config.std), _STATISTICS[config.name], strict=True)
    )
    if min(std) <= 0:
        raise InputError(f"std is {std}; every channel's must be above 0")
    size = config.image_size
    view: Callable[[Image.Image], Tensor]
    if augment == "imagenet":
        view = create_transform(size, interpolation="bicubic", normalize=False)
    else:
        way = v2.InterpolationMode.BILINEAR if config.name == "digits" else v2.InterpolationMode.BICUBIC
        view = v2.Compose([v2.Resize(size, way), v2.CenterCrop(size), v2.PILToTensor()])

    train, test, train_indices, test_indices = _sources(config)
    parts = _split(train.labels[train_indices], train.classes, config.holdout, config.seed)
    pixels = _Pixels(train, view, size)
    test_pixels = pixels if test is train else _Pixels(test, view, size)
    training, holdout, fresh = (train_indices[part] for part in parts)
    random_view = _imagenet(size, mean, std) if augment == "imagenet" else augment
    return Splits(
        train=ImageData(pixels, training, mean, std, random_view, max(1, round(size * _SHIFT[config.name]))),
        calibration=ImageData(pixels, training, mean, std),
        holdout=ImageData(pixels, holdout, mean, std),
        fresh=ImageData(pixels, fresh, mean, std),
        test=ImageData(test_pixels, test_indices, mean, std),
        classes=train.classes,
    )


def _imagenet(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Image.Image], Tensor]:
    """DeiT's augmentation."""
    transform: Callable[[Image.Image], Tensor] = create_transform(
        size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        mean=mean,
        std=std,
    )
    return transform


def _sources(config: DataConfig) -> tuple[_Arrays | _Files, _Arrays | _Files, np.ndarray, np.ndarray]:
    """The sources of the training and the test images, and which of their images those are."""
    # Here and in _split: SciPy comes with it, and whoever only reads a config does not wait for that.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    train: _Arrays | _Files
    test: _Arrays | _Files
    if config.name == "digits":
        digits = load_digits()
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
        train = _Arrays(np.repeat(grey[..., None], 3, axis=3), digits.target, [str(n) for n in digits.target_names])
        chosen, tested = train_test_split(
            np.arange(len(train.labels)), test_size=0.2, stratify=train.labels, random_state=0
        )
        return train, train, np.sort(chosen), np.sort(tested)
    paths = None if config.root is None else _layout(config.root)
    if paths is not None:
        train, test = (_Files(path) for path in paths)
        if train.classes != test.classes:
            odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
            raise InputError(
                f"{paths[0]} has {len(train.classes)} classes, {paths[1]} has {len(test.classes)}, "
                f"and only one of them has {odd}; give both the same class folders"
            )
    elif config.name == "cifar100":
        train, test = _cifar100(config)
    elif config.root is None:
        raise InputError(f"data set 'folder' got no root; set root= to {_LAYOUTS}")
    else:
        missing = "does not exist" if not config.root.exists() else "holds neither of these"
        raise InputError(f"root {config.root} {missing}; it must be {_LAYOUTS}")
    return train, test, np.arange(len(train.labels)), np.arange(len(test.labels))


def _layout(root: Path) -> tuple[Path, Path] | None:
    for train, tests in (("train", ("val", "test")), ("train.tar", ("val.tar", "test.tar"))):
        exists = Path.is_file if train.endswith(".tar") else Path.is_dir
        found = [root / name for name in tests if exists(root / name)]
        if exists(root / train) and found:
            return root / train, found[0]
    return None


def _cifar100(config: DataConfig) -> tuple[_Arrays, _Arrays]:
    """CIFAR-100 in torchvision's layout: pickles, whose MD5 torchvision checks before it reads them."""
    root = config.root or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sidt"
    try:
        sets = [CIFAR100(str(root), train=train, download=config.download) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # no network is an OSError, no or damaged files a RuntimeError
        why = "it could not be downloaded" if config.download else "download is false"
        raise InputError(
            f"CIFAR-100 is not in {root} and {why} ({' '.join(str(error).split())}); "
            "give root= a folder with train.tar and val.tar or train/ and val/, or connect to a network"
        ) from None
    return tuple(_Arrays(data.data, data.targets, data.classes) for data in sets)  # type: ignore[return-value]


def _split(labels: np.ndarray, classes: Sequence[str], part: float, seed: int) -> tuple[np.ndarray, ...]:
    """Sorted positions of train, holdout and fresh, each with every class in the same proportion."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels, minlength=len(classes))
    smallest = int(counts.argmin())
    too_few = InputError(
        f"class '{classes[smallest]}' has {counts[smallest]} training images, too few for holdout={part:g}: "
        f"train, holdout and fresh each need one of every class; add images or change holdout"
    )
    if len(classes) < 2:
        raise InputError(f"the data has one class only ('{classes[0]}'); at least 2 are needed")
    if counts.min() * min(part, 1 - 2 * part) < 1 - 1e-9:
        raise too_few
    each = round(len(labels) * part)
    train, rest = train_test_split(np.arange(len(labels)), test_size=2 * each, stratify=labels, random_state=seed)
    holdout, fresh = train_test_split(rest, test_size=each, stratify=labels[rest], random_state=seed)
    parts = tuple(np.sort(indices) for indices in (train, holdout, fresh))
    if any(np.bincount(labels[indices], minlength=len(classes)).min() == 0 for indices in parts):
        raise too_few
    return parts
