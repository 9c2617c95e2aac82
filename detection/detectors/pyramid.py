"""A feature pyramid from one map."""

import copy
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from sidt.detection.detectors.configs import first_neck
from sidt.errors import InputError

SCALES = (4, 2, 1, 0.5)


@ROOT.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The simple feature pyramid of ViTDet (Li et al. 2022, Exploring plain vision transformer backbones).

    Transposed convolutions and max pooling bring the one map of a plain backbone to every scale; a 1 x 1 and a
    3 x 3 convolution, each with a LayerNorm, follow on each.

    Args:
        in_channels: channels of the map; or a list whose last entry they are, as necks are often given. When the
            backbone's width is pruned, this is the only argument that changes.
        out_channels: channels of every level.
        hidden_channels: channels behind the first transposed convolution; the second of scale 4 has half as many.
            ViTDet has half the channels of its dense backbone, and so a quarter behind the second.
        scales: size of each level relative to the map, from 4, 2, 1 and 0.5, largest first.
        num_outs: how many levels to give; those beyond ``scales`` are the last one, subsampled by 2 again and again.
            Default: one for each scale.
        pooled_channels: channels of what is pooled at scale 0.5: a 1 x 1 convolution without bias, which starts as the
            identity, makes them of the map's. Default: the map itself is pooled. See :func:`only_layers`.
        init_cfg: MMEngine's initialisation; default: PyTorch's own.

    Raises:
        InputError: a scale is not one of those, or there are fewer outputs than scales.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int,
        hidden_channels: int,
        scales: Sequence[float] = SCALES,
        num_outs: int | None = None,
        pooled_channels: int | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        """Build the layers of every scale."""
        super().__init__(init_cfg)
        if not scales or list(scales) != [scale for scale in SCALES if scale in scales]:
            raise InputError(f"scales={list(scales)} of a SimpleFeaturePyramid: take some of {list(SCALES)}, in order")
        self.num_outs = len(scales) if num_outs is None else num_outs
        if self.num_outs < len(scales):
            raise InputError(f"num_outs={num_outs} is less than the {len(scales)} scales; drop scales or raise it")
        channels = in_channels if isinstance(in_channels, int) else in_channels[-1]
        self.pools_the_map = 0.5 in scales and pooled_channels is None
        self.levels = nn.ModuleList(
            _level(scale, channels, hidden_channels, out_channels, pooled_channels) for scale in scales
        )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A map [B, in_channels, H, W], or a tuple whose last entry is taken -> the levels, largest first."""
        features = inputs if isinstance(inputs, Tensor) else inputs[-1]
        outs = [level(features) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)


def _level(scale: float, channels: int, hidden: int, out: int, pooled: int | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    if scale > 1:
        layers.append(nn.ConvTranspose2d(channels, hidden, kernel_size=2, stride=2))
        channels = hidden
    if scale == 4:
        layers += [LayerNorm2d(hidden), nn.GELU(), nn.ConvTranspose2d(hidden, hidden // 2, kernel_size=2, stride=2)]
        channels = hidden // 2
    if scale == 0.5:
        pool: nn.Module = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)  # an odd border is not lost
        if pooled is not None:
            way = nn.Conv2d(channels, pooled, kernel_size=1, bias=False)
            nn.init.dirac_(way.weight)
            pool, channels = nn.Sequential(way, pool), pooled
        layers.append(pool)
    layers += [nn.Conv2d(channels, out, kernel_size=1, bias=False), LayerNorm2d(out)]
    layers += [nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False), LayerNorm2d(out)]
    return nn.Sequential(*layers)


def only_layers(detector: nn.Module, config: Config) -> tuple[nn.Module, Config]:
    """The same detector with a simple pyramid that only applies layers to its map, so that the width can be rotated.

    The largest of four values is another one in another basis. So where the pyramid pools the map, a 1 x 1 convolution
    comes before: the way back is then in it. It is the one layer that a rotated width costs.

    Args:
        detector: it is not changed.
        config: that it was built from.

    Returns:
        The detector, with one layer more, and its config; both as they are if no simple pyramid pools the map.
    """
    given, path = first_neck(config.model)
    pyramid = None if given is None else detector.get_submodule(path)
    if not isinstance(pyramid, SimpleFeaturePyramid) or not pyramid.pools_the_map:
        return detector, config
    own, changed = Config(config.to_dict(), filename=config.filename), copy.deepcopy(detector)
    neck = first_neck(own.model)[0]
    channels = neck.in_channels
    neck.pooled_channels = channels if isinstance(channels, int) else channels[-1]
    larger = MODELS.build(neck).to(next(detector.parameters()))
    larger.load_state_dict(pyramid.state_dict(), strict=False)  # all but the identity
    owner, _, leaf = path.rpartition(".")
    setattr(changed.get_submodule(owner), leaf, larger.train(pyramid.training))
    return changed, own
