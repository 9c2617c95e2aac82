"""The attentions of timm's MaxViT and CoAtNet for any head count, q/k size and v size."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers.mlp import ConvMlp
from timm.models.maxxvit import Attention2d, AttentionCl
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, split_qkv
from sidt.surgery.forwards.relpos import Biased

torch.fx.wrap("attend")  # by the names of a module, whose calls are traced


def split_heads(qkv: Tensor, num_heads: int, v_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, heads * (2 * qk + v)] -> q, k of [B, heads, N, qk] and v of [B, heads, N, v]."""
    heads = qkv.unflatten(-1, [num_heads, -1]).transpose(1, 2)
    v = v_width // num_heads
    qk = (heads.shape[-1] - v) // 2
    q, k, v_units = torch.split(heads, [qk, qk, v], dim=-1)
    return q, k, v_units


def of_nothing(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a 1 x 1 convolution of no channels gives at each place of [B, C, H, W]: its bias."""
    return F.linear(x.permute(0, 2, 3, 1)[..., :0], weight.flatten(1), bias).permute(0, 3, 1, 2)


class SlicedAttention2d(Attention2d, Biased):
    """timm's attention of CoAtNet over all places of a map."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        if not self.num_heads:
            return self.proj_drop(of_nothing(x, self.proj.weight, self.proj.bias))  # type: ignore[no-any-return]
        qkv = self.qkv(x).flatten(2).transpose(1, 2)
        if self.head_first:
            q, k, v = split_heads(qkv, self.num_heads, self.proj.in_channels)
        else:
            q, k, v = split_qkv(qkv, self.num_heads, self.proj.in_channels)
        bias = self.position_bias()
        drop = self.attn_drop.p if self.training else 0.0
        out = attend(q, k, v, self.scale, shared_rel_pos if bias is None else bias, drop)
        out = out.transpose(-1, -2).reshape(x.shape[0], -1, x.shape[2], x.shape[3])
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class SlicedAttentionCl(AttentionCl, Biased):
    """timm's attention of MaxViT within windows, or within the cells of a grid."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, ..., C] -> [B, ..., C']."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        qkv = self.qkv(x).flatten(1, -2)
        if self.head_first:
            q, k, v = split_heads(qkv, self.num_heads, self.proj.in_features)
        else:
            q, k, v = split_qkv(qkv, self.num_heads, self.proj.in_features)
        bias = self.position_bias()
        drop = self.attn_drop.p if self.training else 0.0
        out = attend(q, k, v, self.scale, shared_rel_pos if bias is None else bias, drop)
        out = out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:-1])
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class EmptyConvMlp(ConvMlp):
    """timm's MLP of 1 x 1 convolutions without hidden units."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return of_nothing(x, self.fc2.weight, self.fc2.bias)


def _as_before(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes what it had: the bias repeats the number of heads."""
    return bool(heads == module.num_heads and qk == v == module.dim_head)


FORWARDS: dict[type[nn.Module], Forward] = {
    Attention2d: Forward(SlicedAttention2d, _as_before),
    AttentionCl: Forward(SlicedAttentionCl, _as_before),
}
EMPTY: dict[type[nn.Module], type[nn.Module]] = {ConvMlp: EmptyConvMlp}
