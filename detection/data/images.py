"""Which image a reader could not read. MMEngine's workers, and OpenCV, do not always say it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mmcv
from mmengine.config import Config

from sidt.detection.data.sources import source_of
from sidt.errors import InputError
from sidt.files import read_json

_NAMED = re.compile(r"failed to load image: (.+)|\[Errno \d+\] [^:\n]+: '(.+)'")
_UNNAMED = ("imdecode", "cannot identify image", "image file is truncated", "broken data stream")


@contextmanager
def naming_images(config: Config, *loaders: str) -> Iterator[None]:
    """Say which image it was, if the block fails because it cannot read one.

    Where the error does not name it, all are read, up to the first that cannot be.

    Args:
        config: of the data.
        loaders: those of it that are read from: ``train_dataloader``, ...

    Raises:
        InputError: an image cannot be read. All other errors are passed on.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = str(error)  # of a worker's error, its whole traceback
        named = [Path(one or other) for one, other in _NAMED.findall(text)]
        if not named and not any(words in text for words in _UNNAMED):
            raise
        sources = []
        for loader in loaders:
            with suppress(InputError):  # not there, or of no COCO file
                sources.append(source_of(config, loader))
        files = [
            (source, source.images / image["file_name"])
            for source in sources
            for image in read_json(source.annotations)["images"]
        ]
        for source, file in files:
            if file in named or (not named and not _readable(file, "cv2" if "imdecode" in text else "pillow")):
                raise InputError(
                    f"cannot read the image {file}, which may be damaged; replace it, or take it out of "
                    f"{source.annotations}"
                ) from None
        raise


def _readable(file: Path, backend: str) -> bool:
    try:
        return mmcv.imfrombytes(file.read_bytes(), backend=backend) is not None
    except Exception:
        return False
