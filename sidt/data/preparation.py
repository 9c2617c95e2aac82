"""Which data, and how its images are prepared: what a config says, else the model or the data set."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from timm.data.config import resolve_data_config

from sidt.errors import InputError

Augmentation = Literal["none", "crop", "crop-flip", "imagenet"]
Side = Annotated[int, Field(ge=1)]

# How images are prepared, by what nobody said otherwise: the data set's own, or timm's for a model that says nothing.
_OWN: dict[str, dict[str, Any]] = {
    "digits": {
        "image_size": (32, 32),
        "mean": (0.3053, 0.3053, 0.3053),  # of the training images at 32 x 32
        "std": (0.3457, 0.3457, 0.3457),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    },
    "cifar100": {
        "image_size": (32, 32),
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    },
}


PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # timm's names, in a model's pretrained_cfg


class DataConfig(BaseModel):
    """Which data, how it is split, prepared and augmented.

    How images are prepared is the data set's own for digits and CIFAR-100, and the model's for folders, as timm says it
    (:func:`prepared_for`), wherever it is None here.

    Attributes:
        name: ``digits`` needs no file, ``folder`` is any data set in one of the layouts of ``root``.
        root: a folder with ``train/`` and ``val/`` (or ``test/``), a folder per class in each, or with
            ``train.tar`` and ``val.tar`` (or ``test.tar``), or a folder per class or of images alone, a fifth of which
            is then the test set. Images without class folders have no labels. For ``cifar100`` also torchvision's.
        image_size: in pixels: a side, or height and width.
        holdout: the part of the training data held out for the search; as much again is kept fresh.
        mean: per channel, of pixels in 0..1.
        std: likewise.
        interpolation: of the resize, as timm calls it: bilinear, bicubic, ...
        crop_pct: the part of the resized image that is left by the crop.
        crop_mode: timm's: of the shorter side (center), of both sides apart (squash), or of the longer side (border).
        classes: those of the data set that count, by name; None: all.
        labels: whether the folders are the model's classes; False: they are of images without labels.
        augment: of the training images; None: crop (random shifts) for digits, crop-flip for CIFAR-100,
            imagenet (DeiT's) for folders.
        skip_broken: whether images that cannot be decoded are left out; all are read once to find them.
        download: whether CIFAR-100 may be downloaded when ``root`` has no copy.
        seed: of the train / holdout / fresh split. The test set does not depend on it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["digits", "cifar100", "folder"] = "digits"
    root: Path | None = None
    image_size: Side | tuple[Side, Side] | None = None
    holdout: float = 0.1  # load_data checks it: a one-line error for Python users too
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    crop_pct: float | None = Field(default=None, gt=0)
    crop_mode: Literal["center", "squash", "border"] | None = None
    classes: tuple[str, ...] | None = None
    labels: bool = True
    augment: Augmentation | None = None
    skip_broken: bool = False
    download: bool = True
    seed: int = Field(default=0, ge=0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images.

        Raises:
            InputError: they are the model's, which is not known yet.
        """
        if self.image_size is None:
            raise InputError("image_size is not set; set it, or see sidt.training.prepared_for")
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


def prepared_for(config: DataConfig, cfg: Mapping[str, Any] | None = None, *, published: bool = False) -> DataConfig:
    """The config with everything said about how images are prepared.

    What the config says wins. Then, for folders and for published weights, what the model says
    (``timm.data.resolve_model_data_config``); for digits and CIFAR-100, what is usual there.

    Args:
        config: any.
        cfg: the model's ``pretrained_cfg``; its ``input_size`` is the size that the model is built for.
        published: whether the model has weights that were published with that ``pretrained_cfg``.
    """
    own: Mapping[str, Any] | None = None if published else _OWN.get(config.name)
    if own is None:
        says: dict[str, Any] = resolve_data_config(  # type: ignore[no-untyped-call]
            {}, pretrained_cfg=dict(cfg or {"input_size": (3, 224, 224)})
        )
        own = {**says, "image_size": tuple(says["input_size"][1:])}
    return DataConfig.model_validate(
        {**config.model_dump(), **{name: own[name] for name in _OWN["digits"] if getattr(config, name) is None}}
    )


@dataclass(frozen=True)
class Preparation:
    """How images are prepared, all of it said; the names are those of :class:`DataConfig`."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __str__(self) -> str:
        """In words."""
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"images: {self.size[0]} x {self.size[1]}, {self.interpolation}, crop {self.crop_pct:g} "
            f"({self.crop_mode}), mean {mean}, std {std}"
        )


def preparation_of(config: DataConfig) -> Preparation:
    """How the images of a config are prepared, where no model says it: as is usual for the data set."""
    says = prepared_for(config)
    return Preparation(says.size, *(getattr(says, name) for name in PREPARATION))
