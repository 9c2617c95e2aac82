"""The attention of MMDetection's projects/ViTDet for any sizes, with relative positions that q is multiplied by.

Paper: Li et al. 2022, Exploring Plain Vision Transformer Backbones for Object Detection (arXiv 2203.16527).

No package installs that project: its class is one of a module that the model to be sliced has brought along.
"""

import sys
from typing import Any

import torch.fx
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, split_qkv

torch.fx.wrap("attend")  # by the names of a module, whose calls are traced

_MODULES = ("projects.ViTDet.vitdet.vit", "vitdet.vit")  # in a clone of MMDetection, and in one of its folders


class SlicedVitdetAttention(nn.Module):
    """The attention of ViTDet for any head count and v size, and q/k size where there are no relative positions."""

    qkv: nn.Linear
    proj: nn.Linear
    rel_pos_h: Tensor
    rel_pos_w: Tensor
    num_heads: int
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same."""
        if not self.num_heads:
            return self.proj(x[..., :0])  # type: ignore[no-any-return]
        height, width = x.shape[1], x.shape[2]
        q, k, v = split_qkv(self.qkv(x.flatten(1, 2)), self.num_heads, self.proj.in_features)
        bias: Tensor | None = None
        if hasattr(self, "rel_pos_h"):
            bias = get_decomposed_rel_pos_bias(
                q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, (height, width), (height, width)
            ).unflatten(0, [-1, self.num_heads])
        out = attend(q, k, v, self.scale, bias)
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, [height, width])  # type: ignore[no-any-return]


def _of_one_size(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes any number of heads, if q/k and v have one size: the scale is the dense model's."""
    return qk == v


def __getattr__(name: str) -> Any:
    """``FORWARDS``, of the classes that there are by now."""
    if name != "FORWARDS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = [module.Attention for path in _MODULES if (module := sys.modules.get(path)) is not None]
    return {cls: Forward(SlicedVitdetAttention, _of_one_size, bilinear=False) for cls in found}
