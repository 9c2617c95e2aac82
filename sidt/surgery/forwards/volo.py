"""The attentions of timm's VOLO for any sizes (Yuan et al., VOLO: Vision Outlooker for Visual Recognition)."""

from typing import Any

import torch
import torch.fx
from timm.models.volo import Attention, ClassAttention
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv

torch.fx.wrap("attend")  # torch.fx looks for it in each module that calls it


class SlicedMapAttention(Attention):
    """timm's attention on a map for any head count, q/k size and v size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x.flatten(1, 2)), self.num_heads, self.proj.in_features)
        drop = self.attn_drop.p if self.training else 0.0
        out = attend(q, k, v, self.scale, dropout=drop).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out.unflatten(1, [x.shape[1], x.shape[2]])))  # type: ignore[no-any-return]


class SlicedClassAttention(ClassAttention):
    """timm's attention of the class token alone for any head count, q/k size and v size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C], of which the class token is the first -> [B, 1, C]."""
        first = x[:, :1]
        if not self.num_heads:
            return self.proj_drop(self.proj(first[..., :0]))  # type: ignore[no-any-return]
        kv = self.kv(x)
        k, v = torch.split(kv, [kv.shape[-1] - self.proj.in_features, self.proj.in_features], dim=-1)
        q, k, v = [each.unflatten(-1, [self.num_heads, -1]).transpose(1, 2) for each in (self.q(first), k, v)]
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, self.scale, dropout=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def _fills_the_width_at_scale(module: Any, heads: int, qk: int, v: int) -> bool:
    return fills_the_width(module, heads, qk, v) and bool(module.scale == qk**-0.5)


def _is_even(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes any number of heads, if q/k and v have one size; its scale is its own."""
    return qk == v


FORWARDS: dict[type[nn.Module], Forward] = {
    Attention: Forward(SlicedMapAttention, _fills_the_width_at_scale),
    ClassAttention: Forward(SlicedClassAttention, _is_even),
}
