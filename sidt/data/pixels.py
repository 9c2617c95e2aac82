"""Images as tensors: resized once, kept in memory if they fit, augmented and normalised when they are asked for."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sidt.data.sources import Files, Source

_CACHE_BYTES = 2**29  # decoded images of one source are kept in memory up to this size


class Pixels:
    """The images of a source as uint8 3 x H x W, each decoded once if all of them fit into memory."""

    def __init__(  # noqa: D107
        self, source: Source, view: Callable[[Image.Image], Tensor], size: tuple[int, int]
    ) -> None:
        self.source, self.view = source, view
        count = len(source.labels)
        keep = count * 3 * size[0] * size[1] <= _CACHE_BYTES
        self.cache = torch.empty(count, 3, *size, dtype=torch.uint8) if keep else None
        self.known = torch.zeros(count, dtype=torch.bool)

    def get(self, indices: Tensor) -> Tensor:
        """Some images, N x 3 x H x W."""
        if self.cache is None:
            return torch.stack([self.view(self.source.read(i)) for i in indices.tolist()])
        for i in indices[~self.known[indices]].tolist():
            self.cache[i] = self.view(self.source.read(i))
            self.known[i] = True
        return self.cache[indices]


class ImageData(Dataset[tuple[Tensor, int]]):
    """Some images of a source, with or without augmentation.

    Attributes:
        classes: the class names, in the order of the labels; none: there are no labels.
        labels: int64, the label of every item; nothing is decoded to know it.
        indices: int64, where every item lies in its source (training file or test file).
    """

    def __init__(  # noqa: D107
        self,
        pixels: Pixels,
        indices: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Literal["none", "crop", "crop-flip"] | Callable[[Image.Image], Tensor] = "none",
        shift: tuple[int, int] = (0, 0),
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
        """Image, float 3 x H x W, and label."""
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Several items at once: torch's loaders call this, and small images are fast only so."""
        where = self.indices[indices]
        labels: list[int] = self.labels[indices].tolist()
        if callable(self.augment):
            return [(self.augment(self.pixels.source.read(int(i))), n) for i, n in zip(where, labels, strict=True)]
        images = self.pixels.get(torch.from_numpy(where))
        if self.augment != "none":
            images = crop(images, self.shift, flip=self.augment == "crop-flip")
        return list(zip((images * self._scale + self._shift).unbind(), labels, strict=True))

    def picture(self, index: int) -> Image.Image:
        """An image as the model sees it, before it is normalised."""
        image, _ = self[index]
        bytes_ = ((image - self._shift) / self._scale).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(bytes_.permute(1, 2, 0).numpy())

    def name(self, index: int) -> str:
        """What an image is called: its file's name, or its place where it has none."""
        source, where = self.pixels.source, int(self.indices[index])
        return source.files[where].name if isinstance(source, Files) else f"no. {where}"


def crop(images: Tensor, pad: tuple[int, int], *, flip: bool) -> Tensor:
    """Shift every image by up to ``pad`` pixels down or to the side, black coming in, and mirror half of them."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pad[1], pad[1], pad[0], pad[0]))
    rows = torch.randint(2 * pad[0] + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * pad[1] + 1, (count, 1)) + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    everyone = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[everyone, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
