"""Which images a config names, and which of them are for training, for the search, fresh, and for the test."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR100
from tqdm import tqdm

from sidt.data.preparation import DataConfig
from sidt.data.sources import NO_LABEL, Arrays, Source, broken, check_names, open_files
from sidt.errors import InputError

_Source = TypeVar("_Source", bound=Source)

_LAYOUTS = "a folder with train/ and val/ (or test/), one with train.tar and val.tar (or test.tar), or one of images"
_TEST_PART = 0.2  # of data that come without a test set


@dataclass(frozen=True)
class Parts:
    """The sources of a data set, and which of their images are train, holdout and fresh, and test."""

    source: Source
    test_source: Source
    train: tuple[np.ndarray, ...]
    test: np.ndarray
    rows: tuple[int, ...] | None
    known: tuple[str, ...]


def parts_of(config: DataConfig) -> Parts:
    """The images that a config names, split.

    Raises:
        InputError: as for :func:`sidt.data.load_data`.
    """
    train, test, alone = _sources(config)
    rows, known_classes = None, train.classes
    if config.classes is not None:
        check_names(config.classes, train.classes, config.root or config.name)
        rows = tuple(label for label, name in enumerate(train.classes) if name in config.classes)
        chosen, test = _chosen(train, rows), (train if alone else _chosen(test, rows))
        train, test = chosen, (chosen if alone else test)
    if not config.labels:
        train, test = (source.only(*_all(source), ()) for source in (train, test))
        test = train if alone else test
    if config.skip_broken:
        train, test = _whole(train), (test if alone else _whole(test))
        test = train if alone else test
    if not alone:
        parts = _split(train.labels, train.classes, config.holdout, config.seed)
        return Parts(train, test, parts, np.arange(len(test.labels)), rows, known_classes)
    tested, known = _drawn(train, config.name)
    if config.name == "digits":
        parts = _split(train.labels[known], train.classes, config.holdout, config.seed)
    else:  # a few images of a class, or none in some part, are enough to prune on
        parts = _split(np.zeros(len(known), dtype=np.int64), (), config.holdout, config.seed)
    return Parts(train, train, tuple(known[part] for part in parts), tested, rows, known_classes)


def _all(source: Source) -> tuple[np.ndarray, np.ndarray]:
    count = len(source.labels)
    return np.arange(count), np.full(count, NO_LABEL)


def _chosen(source: _Source, rows: Sequence[int]) -> _Source:
    """The images of some classes, which are numbered anew."""
    new = np.full(len(source.classes), NO_LABEL)
    new[list(rows)] = np.arange(len(rows))
    indices = np.flatnonzero(new[source.labels] != NO_LABEL)
    return source.only(indices, new[source.labels[indices]], tuple(source.classes[row] for row in rows))  # type: ignore[return-value]


def _whole(source: _Source) -> _Source:
    """Without the images that cannot be decoded, which are named."""
    bad = broken(source)
    if not bad:
        return source
    for _, reason in bad:
        tqdm.write(f"left out: {reason}", file=sys.stderr)
    indices = np.setdiff1d(np.arange(len(source.labels)), [index for index, _ in bad])
    return source.only(indices, source.labels[indices], source.classes)  # type: ignore[return-value]


def _drawn(source: Source, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The test images of data that come without a test set, the same every time, and the others."""
    everything = np.arange(len(source.labels))
    stratify = source.labels if name == "digits" else None
    if len(everything) < 2:
        raise InputError(f"{getattr(source, 'path', name)} holds one image only; more are needed")
    known, tested = train_test_split(everything, test_size=_TEST_PART, stratify=stratify, random_state=0)
    return np.sort(tested), np.sort(known)


def _sources(config: DataConfig) -> tuple[Source, Source, bool]:
    """The sources of the training and the test images; whether they are one."""
    train: Source
    test: Source
    if config.name == "digits":
        digits = load_digits()
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
        names = tuple(str(n) for n in digits.target_names)
        train = Arrays(np.repeat(grey[..., None], 3, axis=3), np.asarray(digits.target, dtype=np.int64), names)
        return train, train, True
    paths = None if config.root is None else _layout(config.root)
    if paths is not None:
        train, test = (open_files(path) for path in paths)
        if train.classes != test.classes:
            odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
            raise InputError(
                f"{paths[0]} has {len(train.classes)} classes, {paths[1]} has {len(test.classes)}, "
                f"and only one of them has {odd}; give both the same class folders"
            )
        return train, test, False
    if config.name == "cifar100":
        return *_cifar100(config), False
    if config.root is None:
        raise InputError(f"data set 'folder' got no root; set root= to {_LAYOUTS}")
    if not config.root.is_dir():
        wrong = "is no folder" if config.root.exists() else "does not exist"
        raise InputError(f"root {config.root} {wrong}; it must be {_LAYOUTS}")
    train = open_files(config.root)
    if set(train.classes) <= {"train", "val", "validation", "test"} and train.classes:
        raise InputError(
            f"root {config.root} holds {' and '.join(train.classes)} alone; give the folder with the classes, or one "
            "with train/ and val/ (or test/)"
        )
    return train, train, True


def _layout(root: Path) -> tuple[Path, Path] | None:
    for train, tests in (("train", ("val", "test")), ("train.tar", ("val.tar", "test.tar"))):
        exists = Path.is_file if train.endswith(".tar") else Path.is_dir
        found = [root / name for name in tests if exists(root / name)]
        if exists(root / train) and found:
            return root / train, found[0]
    return None


def _cifar100(config: DataConfig) -> tuple[Arrays, Arrays]:
    """CIFAR-100 in torchvision's layout: pickles, whose MD5 torchvision checks before it reads them."""
    root = config.root or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sidt"
    try:
        train, test = (CIFAR100(str(root), train=train, download=config.download) for train in (True, False))
    except (OSError, RuntimeError) as error:  # no network is an OSError, no or damaged files a RuntimeError
        why = "it could not be downloaded" if config.download else "download is false"
        raise InputError(
            f"CIFAR-100 is not in {root} and {why} ({' '.join(str(error).split())}); "
            "give root= a folder with train.tar and val.tar or train/ and val/, or connect to a network"
        ) from None
    first, second = (Arrays(d.data, np.asarray(d.targets, dtype=np.int64), tuple(d.classes)) for d in (train, test))
    return first, second


def _split(labels: np.ndarray, classes: Sequence[str], part: float, seed: int) -> tuple[np.ndarray, ...]:
    """Sorted positions of train, holdout and fresh, each with every class in the same proportion, if there are any."""
    counts = np.bincount(labels, minlength=len(classes)) if classes else np.array([len(labels)])
    smallest = int(counts.argmin())
    of = f"class '{classes[smallest]}'" if classes else "the folder"
    too_few = InputError(
        f"{of} has {counts[smallest]} training images, too few for holdout={part:g}: "
        f"train, holdout and fresh each need one{' of every class' if classes else ''}; add images or change holdout"
    )
    if len(classes) == 1:
        raise InputError(f"the data has one class only ('{classes[0]}'); at least 2 are needed")
    if counts.min() * min(part, 1 - 2 * part) < 1 - 1e-9:
        raise too_few
    each, stratify = round(len(labels) * part), labels if classes else None
    train, rest = train_test_split(np.arange(len(labels)), test_size=2 * each, stratify=stratify, random_state=seed)
    again = None if stratify is None else labels[rest]
    holdout, fresh = train_test_split(rest, test_size=each, stratify=again, random_state=seed)
    parts = tuple(np.sort(indices) for indices in (train, holdout, fresh))
    if classes and any(np.bincount(labels[indices], minlength=len(classes)).min() == 0 for indices in parts):
        raise too_few
    return parts
