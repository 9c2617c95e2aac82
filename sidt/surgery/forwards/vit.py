"""timm's ViT blocks that have attention and MLP side by side, and differential attention, for any sizes.

Papers: 'Scaling Vision Transformers to 22 Billion Parameters' (https://arxiv.org/abs/2302.05442), whose block has one
layer for all that is read and one for all that is written; 'Differential Transformer'
(https://arxiv.org/abs/2410.05258), whose heads take one softmax from another: q and k of a head are two of each.
"""

from typing import Any

import torch
import torch.fx
from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor, nn

from sidt.surgery import attention
from sidt.surgery.attention import EMPTY, Forward, attend, fills_the_width, split_qkv

__all__ = ["EMPTY", "FORWARDS"]

torch.fx.wrap("attend")  # by the names of a module, whose calls are traced


class SlicedDiffAttention(DiffAttention):
    """timm's differential attention for any head count and q/k size."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)  # [B, heads, N, qk] each
        drop = self.attn_drop_p if self.training else 0.0
        first = attend(self.q_norm(q1), self.k_norm(k1), v, self.scale, attn_mask, drop, is_causal)
        second = attend(self.q_norm(q2), self.k_norm(k2), v, self.scale, attn_mask, drop, is_causal)
        x = self.sub_norm(first - self._compute_lambda().type_as(q) * second) * (1 - self.lambda_init)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))  # type: ignore[no-any-return]


class SlicedParallelBlock(ParallelScalingBlock):
    """timm's block of attention and MLP side by side for any head count, q/k size, v size and hidden size."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        y = self.in_proj(self.in_norm(x))
        hidden, qkv = torch.split(y, [self.in_split[0], y.shape[-1] - self.in_split[0]], dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if self.num_heads:
            q, k, v = split_qkv(qkv, self.num_heads, self.in_split[3])
            drop = self.attn_drop.p if self.training else 0.0
            out = attend(self.q_norm(q), self.k_norm(k), v, self.scale, attn_mask, drop, is_causal)
            out = out.transpose(1, 2).flatten(2)
        else:
            out = qkv
        if self.out_proj is not None:
            out = self.out_proj(torch.cat([out, hidden], dim=-1))
        else:
            out = self.attn_out_proj(out) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(out))  # type: ignore[no-any-return]


class SlicedDiffParallelBlock(DiffParallelScalingBlock):
    """timm's block of differential attention and MLP side by side for any head count, q/k size and hidden size."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        y = self.in_proj(self.in_norm(x))
        hidden, qkv = torch.split(y, [self.in_split[0], y.shape[-1] - self.in_split[0]], dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if self.num_heads:
            q, k, v = split_qkv(qkv, self.num_heads, self.in_split[3])
            (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)  # [B, heads, N, qk] each
            drop = self.attn_drop_p if self.training else 0.0
            first = attend(self.q_norm(q1), self.k_norm(k1), v, self.scale, attn_mask, drop, is_causal)
            second = attend(self.q_norm(q2), self.k_norm(k2), v, self.scale, attn_mask, drop, is_causal)
            out = self.sub_norm(first - self._compute_lambda().type_as(q) * second) * (1 - self.lambda_init)
            out = out.transpose(1, 2).flatten(2)
        else:
            out = qkv
        return x + self.drop_path(self.ls(self.out_proj(torch.cat([out, hidden], dim=-1))))  # type: ignore[no-any-return]


def _two_of_each(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes what fills the width, with half as much q and k in each of the two as v, and their size the scale."""
    return fills_the_width(module, heads, qk, v) and bool(module.scale == (qk // 2) ** -0.5)


def _block_fills(module: Any, heads: int, qk: int, v: int) -> bool:
    return bool(qk == v and heads * v == module.in_proj.in_features and module.scale == qk**-0.5)


def _block_fills_by_two(module: Any, heads: int, qk: int, v: int) -> bool:
    return bool(qk == v and heads * v == module.in_proj.in_features and module.scale == (qk // 2) ** -0.5)


FORWARDS: dict[type[nn.Module], Forward] = {
    **attention.FORWARDS,
    DiffAttention: Forward(SlicedDiffAttention, _two_of_each, bilinear=False),  # two products of a head
    ParallelScalingBlock: Forward(SlicedParallelBlock, _block_fills),
    DiffParallelScalingBlock: Forward(SlicedDiffParallelBlock, _block_fills_by_two, bilinear=False),
}
