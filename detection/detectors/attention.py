"""Attention forwards for MMDetection's own backbones; see :mod:`sidt.surgery.attention`."""

from typing import Any

import torch.nn.functional as F
from mmdet.models.backbones.pvt import MixFFN, SpatialReductionAttention
from mmdet.models.backbones.swin import WindowMSA
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv


class SlicedWindowMSA(WindowMSA):
    """MMDetection's Swin window attention for any head count, q/k size and v size."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows * B, N, C] -> the same; mask is [windows, N, N] or ``None``."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]  # [N * N, heads]
        bias = bias.unflatten(0, self.relative_position_index.shape).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            bias = (bias + mask.to(bias).unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, self.scale, bias, drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class SlicedMultiheadAttention(nn.MultiheadAttention):
    """torch's attention for any head count, q/k size and v size, as MMDetection's PVT uses it.

    That is: tokens first, one packed projection, and no mask.
    """

    scale: float
    in_proj_weight: nn.Parameter

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """[N, B, C], [M, B, C], [M, B, C] -> [N, B, C], and ``None`` for the weights, which nobody reads."""
        if not self.num_heads:
            return self.out_proj(query[..., :0]), None
        v_width = self.out_proj.in_features
        qk_width = (self.in_proj_weight.shape[0] - v_width) // 2
        widths = (qk_width, qk_width, v_width)
        weights = self.in_proj_weight.split(widths)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(widths)
        q, k, v = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )  # [B, heads, tokens, size]
        drop = self.dropout if self.training else 0.0
        x = attend(q, k, v, self.scale, dropout=drop)
        return self.out_proj(x.permute(2, 0, 1, 3).flatten(2)), None


class EmptySpatialReductionAttention(SpatialReductionAttention):
    """MMDetection's PVT attention without heads: nothing reads what its convolution would reduce."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None) -> Tensor:
        """[B, N, C] -> the same, added to ``identity`` (default: x)."""
        out = self.dropout_layer(self.proj_drop(self.attn(x, x, x)[0]))
        return (x if identity is None else identity) + out


class EmptyMixFFN(MixFFN):
    """MMDetection's PVT v2 MLP without hidden units: convolutions take no channels."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None) -> Tensor:
        """[B, N, C] -> the same, added to ``identity`` (default: x)."""
        *_, last, drop = self.layers
        out = F.linear(x[..., :0], last.weight.flatten(1), last.bias)
        return (x if identity is None else identity) + self.dropout_layer(drop(out))


def _torch_takes(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes heads of one size that together have the width, and takes its scale from that size."""
    return bool(qk == v == module.head_dim and heads * v == module.out_proj.out_features)


FORWARDS: dict[type[nn.Module], Forward] = {
    WindowMSA: Forward(SlicedWindowMSA, fills_the_width),
    nn.MultiheadAttention: Forward(SlicedMultiheadAttention, _torch_takes, scale=lambda m: float(m.head_dim**-0.5)),
}

EMPTY: dict[type[nn.Module], type[nn.Module]] = {
    SpatialReductionAttention: EmptySpatialReductionAttention,
    MixFFN: EmptyMixFFN,
}
