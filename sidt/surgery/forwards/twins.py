"""The attentions of timm's Twins for any sizes (Chu et al., Twins: Revisiting the Design of Spatial Attention)."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv

torch.fx.wrap("attend")  # torch.fx looks for it in each module that calls it


class SlicedGroupedAttention(LocallyGroupedAttn):
    """timm's attention in windows for any head count, q/k size and v size. The map is padded to whole windows."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, H * W, C] -> the same; ``size`` is H, W."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        height, width = size
        x = x.unflatten(1, [height, width])
        x = F.pad(x, [0, 0, 0, (self.ws - width % self.ws) % self.ws, 0, (self.ws - height % self.ws) % self.ws])
        x = x.unflatten(2, [-1, self.ws]).unflatten(1, [-1, self.ws]).transpose(2, 3)  # [B, rows, columns, ws, ws, C]
        grid = [x.shape[0], x.shape[1], x.shape[2]]
        q, k, v = split_qkv(self.qkv(x.flatten(3, 4).flatten(0, 2)), self.num_heads, self.proj.in_features)
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, self.scale, dropout=drop).transpose(1, 2).flatten(2)  # [windows, ws * ws, heads * v]
        x = x.unflatten(1, [self.ws, self.ws]).unflatten(0, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.proj_drop(self.proj(x[:, :height, :width].flatten(1, 2)))  # type: ignore[no-any-return]


class SlicedSubSampleAttention(GlobalSubSampleAttn):
    """timm's attention to a reduced map for any head count, q/k size and v size."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, H * W, C] -> the same; ``size`` is H, W."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q = self.q(x)
        if self.sr is not None:
            x = self.sr(x.transpose(1, 2).unflatten(-1, [size[0], size[1]])).flatten(2).transpose(1, 2)
            x = self.norm(x)
        kv = self.kv(x)
        k, v = torch.split(kv, [kv.shape[-1] - self.proj.in_features, self.proj.in_features], dim=-1)
        q, k, v = [each.unflatten(-1, [self.num_heads, -1]).transpose(1, 2) for each in (q, k, v)]
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, self.scale, dropout=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def _fills_the_width_at_scale(module: Any, heads: int, qk: int, v: int) -> bool:
    return fills_the_width(module, heads, qk, v) and bool(module.scale == qk**-0.5)


FORWARDS: dict[type[nn.Module], Forward] = {
    LocallyGroupedAttn: Forward(SlicedGroupedAttention, _fills_the_width_at_scale),
    GlobalSubSampleAttn: Forward(SlicedSubSampleAttention, _fills_the_width_at_scale),
}
