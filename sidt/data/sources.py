"""Where images come from: arrays in memory, folders and tars. Pixels are read as timm reads them.

A folder is read as torchvision's ImageFolder reads it: its folders are the classes, whatever lies between them and the
images; one with images and no folders has no labels.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from sidt.errors import InputError

Labels = npt.NDArray[np.int64]

NO_LABEL = -1
_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".jp2")  # lower case; what else Pillow reads
# Pictures that are not read: said, since leaving them out would change the data without a word.
_OTHER_PICTURES = {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".arw", ".psd", ".exr", ".npy", ".dcm"}
_NO_CLASSES = ("__MACOSX", "@eaDir")  # what systems leave beside the classes, as hidden folders
_DEEPEST = 65535  # 16 bits


class DataError(InputError):
    """An image cannot be read. Raised while reading, also in a worker of a DataLoader."""

    def __init__(self, message: str) -> None:  # noqa: D107
        # torch re-raises a worker's exception with the traceback as its message: keep the line that matters.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: "))


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images in memory.

    Attributes:
        arrays: uint8, N x H x W x 3.
        labels: of each image.
        classes: the class names, in the order of the labels; none: there are no labels.
    """

    arrays: npt.NDArray[np.uint8]
    labels: Labels
    classes: tuple[str, ...]

    def read(self, index: int) -> Image.Image:
        """An image, RGB."""
        return Image.fromarray(self.arrays[index])

    def only(self, indices: Labels, labels: Labels, classes: tuple[str, ...]) -> "Arrays":
        """Some of the images, with other labels."""
        return Arrays(self.arrays[indices], labels, classes)


@dataclass(frozen=True)
class _File:
    """An image file, or a stretch of a tar."""

    name: str
    path: Path
    start: int = 0
    size: int | None = None


@dataclass(frozen=True, eq=False)
class Files:
    """Images in a folder or a tar.

    Attributes:
        path: the folder or tar.
        files: its images.
        labels: of each image.
        classes: the class names, sorted as text; none: there are no labels.
    """

    path: Path
    files: tuple[_File, ...]
    labels: Labels
    classes: tuple[str, ...]

    def read(self, index: int) -> Image.Image:
        """An image, RGB.

        Raises:
            DataError: it cannot be decoded.
        """
        file = self.files[index]
        try:
            # Not through timm's ImageDataset: it would put the next image in place of one it cannot decode.
            with file.path.open("rb") as opened, Image.open(_bytes_of(opened, file)) as image:
                return as_rgb(image)
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):  # its own text is the repr of the open file
                reason = "no known image format"
            raise DataError(f"cannot decode {file.name} in {self.path}: {reason}; remove or replace it") from None

    def only(self, indices: Labels, labels: Labels, classes: tuple[str, ...]) -> "Files":
        """Some of the images, with other labels."""
        return replace(self, files=tuple(self.files[i] for i in indices), labels=labels, classes=classes)


Source = Arrays | Files


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB with 8 bits a channel, as timm has it; 16 bits are scaled, where Pillow clips.

    Raises:
        ValueError: its pixels are floats or have 32 bits, so that their range is not known.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= _DEEPEST:
            raise ValueError("its pixels have 32 bits and no known range: save it with 8 or 16")
        return Image.fromarray(np.round(values * (255 / _DEEPEST)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floats of no known range: save it with 8 or 16 bits")
    return image.convert("RGB")


def open_files(path: Path) -> Files:
    """The images of a folder or a tar.

    Raises:
        InputError: it cannot be read, holds no image or a class without one, has images beside its class folders, or
            pictures of a kind that is not read.
    """
    found = list(_members(path) if path.suffix == ".tar" else _listed(path))
    left_out = Counter(suffix for name, _ in found if (suffix := _suffix(name)) in _OTHER_PICTURES)
    files = [file for name, file in found if _suffix(name) in _SUFFIXES]
    if left_out:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
        raise InputError(f"{path} holds pictures of kinds that are not read ({kinds}); convert them to PNG or JPEG")
    if not files:
        raise InputError(f"{path} holds no images; expected <class>/<image> files, or images alone")
    parts = [PurePosixPath(file.name).parts for file in files]
    if path.suffix == ".tar" and len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 2:
        parts = [p[1:] for p in parts]  # the tar of a folder
    flat = [len(p) == 1 for p in parts]
    if all(flat):
        return Files(path, tuple(files), np.full(len(files), NO_LABEL), ())
    if any(flat):
        raise InputError(f"{path} holds images outside of any class folder; expected <class>/<image> files")
    classes = sorted({p[0] for p in parts})
    empty = [] if path.suffix == ".tar" else sorted(set(_class_folders(path)) - set(classes))
    if empty:
        raise InputError(
            f"{path / empty[0]} holds no image that is read ({', '.join(_SUFFIXES)}); add some or remove it"
        )
    order = {name: label for label, name in enumerate(classes)}
    return Files(path, tuple(files), np.array([order[p[0]] for p in parts], dtype=np.int64), tuple(classes))


def broken(source: Source) -> list[tuple[int, str]]:
    """The index of each image that cannot be decoded, and what is wrong with it. All are read."""
    found = []
    for index in tqdm(range(len(source.labels)), desc="looking for broken images", disable=isinstance(source, Arrays)):
        try:
            source.read(index)
        except DataError as error:
            found.append((index, str(error)))
    return found


def check_names(names: Sequence[str], classes: Sequence[str], path: object) -> None:
    """Check that names are classes of a data set.

    Raises:
        InputError: some are not.
    """
    missing = [name for name in names if name not in classes]
    if missing or len(set(names)) < 2:
        wrong = f"has no class {', '.join(map(repr, missing))}" if missing else "needs 2 classes at least to choose of"
        some = ", ".join(classes[:8]) + (f", ... ({len(classes)})" if len(classes) > 8 else "")
        raise InputError(f"{path} {wrong} (asked for {', '.join(names)}); its classes are {some or 'none: no labels'}")


def _bytes_of(opened: BinaryIO, file: _File) -> BinaryIO:
    if file.size is None:
        return opened
    opened.seek(file.start)
    return io.BytesIO(opened.read(file.size))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _class_folders(path: Path) -> list[str]:
    return [e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith(".") and e.name not in _NO_CLASSES]


def _listed(path: Path) -> Iterator[tuple[str, _File]]:
    """The files below a folder, sorted; links are followed, hidden folders are not."""
    try:
        names = sorted(e.name for e in os.scandir(path) if e.is_file())
        folders = sorted(_class_folders(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    for name in names:
        yield name, _File(name, path / name)
    for folder in folders:
        for root, inner, own in os.walk(path / folder, followlinks=True):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(own):
                file = Path(root, name)
                relative = file.relative_to(path).as_posix()
                yield relative, _File(relative, file)


def _members(path: Path) -> Iterator[tuple[str, _File]]:
    """The files of a tar, with where they lie in it."""
    _check_tar_end(path)
    try:
        with tarfile.open(path, "r:") as tar:
            members = [m for m in tar.getmembers() if m.isfile()]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}; it is damaged or cut short: copy it again") from None
    for member in sorted(members, key=lambda m: m.name):
        name = str(PurePosixPath(member.name))
        yield name, _File(name, path, member.offset_data, member.size)


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
