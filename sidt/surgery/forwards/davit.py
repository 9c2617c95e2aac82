"""The attentions of timm's DaViT, in windows and among channels.

Paper: 'DaViT: Dual Attention Vision Transformers' (https://arxiv.org/abs/2204.03645).
"""

from typing import Any

import torch.fx
from timm.models.davit import ChannelAttention, ChannelAttentionV2, WindowAttention
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv

torch.fx.wrap("attend")  # by the names of a module, whose calls are traced


class SlicedWindowAttention(WindowAttention):
    """DaViT's attention in windows for any head count, q/k size and v size."""

    def forward(self, x: Tensor) -> Tensor:
        """[windows * B, N, C] -> the same."""
        if not self.num_heads:
            return self.proj(x[..., :0])  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        return self.proj(attend(q, k, v, self.scale).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SlicedChannelAttention(ChannelAttention):
    """DaViT's attention among the channels of a head for any head count."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> the same."""
        if not self.num_heads:
            return self.proj(x[..., :0])  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        logits = (k * self.scale).transpose(-1, -2) @ v
        out = (logits.softmax(dim=-1) @ q.transpose(-1, -2)).transpose(-1, -2)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SlicedChannelAttentionV2(ChannelAttentionV2):
    """The same of Florence-2's DaViT, whose scale may follow the number of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> the same."""
        if not self.groups:
            return self.proj(x[..., :0])  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.groups, self.proj.in_features)
        scale = x.shape[1] ** -0.5 if self.dynamic_scale else self.head_dim**-0.5
        logits = (q * scale).transpose(-1, -2) @ k
        out = (logits.softmax(dim=-1) @ v.transpose(-1, -2)).transpose(-1, -2)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _as_before(module: Any, heads: int, qk: int, v: int) -> bool:
    return fills_the_width(module, heads, qk, v) and bool(module.scale == qk**-0.5)


# Channels that attend are no products of q and k over units, in which another basis would give the same.
FORWARDS: dict[type[nn.Module], Forward] = {
    WindowAttention: Forward(SlicedWindowAttention, _as_before),
    ChannelAttention: Forward(SlicedChannelAttention, fills_the_width, bilinear=False),
    ChannelAttentionV2: Forward(SlicedChannelAttentionV2, fills_the_width, bilinear=False),
}
