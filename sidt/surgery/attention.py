"""Attention forwards that take pruned heads, and q/k sizes that differ from v sizes.

timm's attentions derive every size from one head size, and the fused kernel takes its scale from the q size
it sees. These subclasses read the sizes from the weights and pass on the scale of the dense model. They add
no parameter and keep every name, so state dicts are those of the plain modules.

An attention without heads adds its output bias and computes nothing else. Neither does an MLP without hidden units:
torch's linear layers take no features as they are, and ``EMPTY`` has what does not.

A search-space file whose attention is not timm's names the module that has its ``FORWARDS`` and ``EMPTY``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers.attention import Attention as VitAttention
from timm.layers.attention import AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.eva import EvaAttention
from timm.models.pvt_v2 import Attention as PvtV2Attention
from timm.models.pvt_v2 import MlpWithDepthwiseConv as PvtV2Mlp
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from torch import Tensor, nn

from sidt.surgery.positions import ROTARY, own_angles, turned


@dataclass(frozen=True)
class Forward:
    """The forward of an attention class for any sizes.

    Attributes:
        sliced: the subclass that has it. Only a module's class is changed, so it has no ``__init__`` of its own.
        takes: whether the plain class's own forward is right for a module with sliced weights, given its heads,
            q/k size and v size.
        scale: the scale of a dense module, kept as its attribute ``scale`` if the plain class has none.
        bilinear: whether logits are products of q and k, so that a basis of both may be chosen.
        buffers: what it knows by which of the dense model's heads and rows its own are, as it is given the angles of
            rotary positions, or biases, of all of these; see :func:`sidt.surgery.positions.remember`.
    """

    sliced: type[nn.Module]
    takes: Callable[[Any, int, int, int], bool]
    scale: Callable[[Any], float] | None = None
    bilinear: bool = True
    buffers: tuple[str, ...] = ()


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, heads * size] -> [B, heads, N, size]."""
    return x.unflatten(-1, [num_heads, -1]).transpose(1, 2)  # type: ignore[no-any-return]


def split_qkv(qkv: Tensor, num_heads: int, v_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 2 * heads * qk + heads * v] -> q, k of [B, heads, N, qk] and v of [B, heads, N, v]."""
    qk_width = (qkv.shape[-1] - v_width) // 2
    q, k, v = torch.split(qkv, [qk_width, qk_width, v_width], dim=-1)
    return _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Fused attention of q, k of [B, heads, N, qk] and v of [B, heads, N, v] -> [B, heads, N, v].

    On CPU torch's fused kernel takes q/k and v of one size only, and no mask that is trained; otherwise attention is
    separate products, at about twice the time. So there the smaller are filled up with zeros, which add nothing.

    TorchScript compiles it; torch.fx takes it as one call, since it looks at devices and sizes.
    """
    size = v.shape[-1]
    trained = mask is not None and mask.requires_grad
    fused = True
    # CPU has the same switch as CUDA; no compiler can read it.
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        fused = torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()
    if q.device.type == "cpu" and fused and not trained and q.shape[-1] != size:
        missing = size - q.shape[-1]
        if missing > 0:
            q, k = F.pad(q, [0, missing]), F.pad(k, [0, missing])
        else:
            v = F.pad(v, [0, -missing])
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale)
    return out[..., :size]


torch.fx.wrap("attend")
torch.fx.wrap("own_angles")  # it looks at sizes, too


class SlicedVitAttention(VitAttention):
    """timm's ViT attention for any head count, q/k size and v size."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(self.q_norm(q), self.k_norm(k), v, self.scale, attn_mask, drop, is_causal)
        x = self.norm(x.transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


class SlicedSwinAttention(SwinAttention):
    """timm's Swin window attention for any head count, q/k size and v size."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows * B, N, C] -> the same; mask is [windows, N, N] or ``None``."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        bias = self._get_rel_pos_bias()
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, self.scale, bias, drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class SlicedSwinV2Attention(SwinV2Attention):
    """timm's Swin V2 cosine window attention for any head count, q/k size and v size."""

    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows * B, N, C] -> the same; mask is [windows, N, N] or ``None``."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        bias = None if self.q_bias is None else torch.cat([self.q_bias, self.k_bias, self.v_bias])  # type: ignore[list-item]
        q, k, v = split_qkv(F.linear(x, self.qkv.weight, bias), self.num_heads, self.proj.in_features)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp()
        table = self.cpb_mlp(self.relative_coords_table).reshape(-1, self.num_heads)
        area = self.window_size[0] * self.window_size[1]
        table = table[self.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        position_bias = (16 * torch.sigmoid(table)).unsqueeze(0)
        if mask is not None:
            position_bias = (position_bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, F.normalize(k, dim=-1), v, 1.0, position_bias, drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class SlicedPvtV2Attention(PvtV2Attention):
    """timm's PVT v2 spatial-reduction attention for any head count, q/k size and v size."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """[B, H * W, C] -> the same; ``feat_size`` is H, W."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q = _heads(self.q(x), self.num_heads)
        if self.sr is not None:
            x = x.transpose(1, 2).unflatten(-1, feat_size)
            x = self.sr(x if self.pool is None else self.pool(x)).flatten(2).transpose(1, 2)
            x = self.norm(x)
            x = x if self.act is None else self.act(x)
        kv = self.kv(x)
        k, v = torch.split(kv, [kv.shape[-1] - self.proj.in_features, self.proj.in_features], dim=-1)
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, _heads(k, self.num_heads), _heads(v, self.num_heads), self.scale, dropout=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class SlicedEvaAttention(EvaAttention):
    """timm's EVA attention, with rotary positions or without, for any head count, pairs of q and k, and v size."""

    turned: Tensor | None
    turned_heads: Tensor | None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        if self.qkv is not None:
            bias = None if self.q_bias is None else torch.cat([self.q_bias, self.k_bias, self.v_bias])  # type: ignore[list-item]
            q, k, v = split_qkv(F.linear(x, self.qkv.weight, bias), self.num_heads, self.proj.in_features)
        else:
            q, k = _heads(self.q_proj(x), self.num_heads), _heads(self.k_proj(x), self.num_heads)
            v = _heads(self.v_proj(x), self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            angles = own_angles(rope, self.turned_heads, self.turned, self.num_heads)
            q = turned(q, angles, self.num_prefix_tokens, self.rotate_half)
            k = turned(k, angles, self.num_prefix_tokens, self.rotate_half)
        drop = self.attn_drop.p if self.training else 0.0
        out = self.norm(attend(q, k, v, self.scale, attn_mask, drop, is_causal).transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class SlicedRopeAttention(AttentionRope):
    """timm's attention with rotary positions for any head count (as many of q as of k and v), pairs of q and k, v size.

    Most of it stands in :class:`SlicedEvaAttention` too: torch.jit.script compiles no function that takes a module.
    """

    turned: Tensor | None
    turned_heads: Tensor | None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        if self.qkv is not None:
            q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        else:
            q, k = _heads(self.q_proj(x), self.num_heads), _heads(self.k_proj(x), self.num_heads)
            v = _heads(self.v_proj(x), self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            angles = own_angles(rope, self.turned_heads, self.turned, self.num_heads)
            q = turned(q, angles, self.num_prefix_tokens, self.rotate_half)
            k = turned(k, angles, self.num_prefix_tokens, self.rotate_half)
        drop = self.attn_drop.p if self.training else 0.0
        out = self.norm(attend(q, k, v, self.scale, attn_mask, drop, is_causal).transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class SlicedLatentPool(AttentionPoolLatent):
    """timm's pooling by the attention of learned queries, as of SigLIP, for any head count, q/k size and v size."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, pooled], or [B, queries, pooled] if they are not pooled."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        latent = self.latent.expand(x.shape[0], -1, -1)
        if self.num_heads:
            q = self.q_norm(_heads(self.q(latent), self.num_heads))
            kv = self.kv(x)
            k, v = torch.split(kv, [kv.shape[-1] - self.proj.in_features, self.proj.in_features], dim=-1)
            k = self.k_norm(_heads(k, self.num_heads))
            latent = attend(q, k, _heads(v, self.num_heads), self.scale, attn_mask).transpose(1, 2).flatten(2)
        else:
            latent = latent[..., :0]
        x = self.proj_drop(self.proj(latent))
        x = x + self.mlp(self.norm(x))
        return x[:, 0] if self.pool == "token" else x.mean(1) if self.pool == "avg" else x


class EmptyPvtV2Mlp(PvtV2Mlp):
    """timm's PVT v2 MLP without hidden units: its depthwise convolution would have no group."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """[B, H * W, C] -> the same; ``feat_size`` is H, W."""
        return self.drop(self.fc2(x[..., :0]))  # type: ignore[no-any-return]


def _scale_is_of(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes any number of heads, if q/k and v have one size and it is the one that the scale is of."""
    return bool(qk == v and module.scale == qk**-0.5)


def fills_the_width(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes heads of one size that together have the width."""
    return bool(qk == v and heads * v == module.proj.out_features)


def _fills_the_width_at_scale(module: Any, heads: int, qk: int, v: int) -> bool:
    return fills_the_width(module, heads, qk, v) and _scale_is_of(module, heads, qk, v)


def _fills_what_it_reads(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes heads that together have the width of the tokens, and their size the scale."""
    return bool(heads * v == module.kv.in_features) and _scale_is_of(module, heads, qk, v)


FORWARDS: dict[type[nn.Module], Forward] = {
    VitAttention: Forward(SlicedVitAttention, _scale_is_of),
    SwinAttention: Forward(SlicedSwinAttention, _scale_is_of),
    SwinV2Attention: Forward(
        SlicedSwinV2Attention, fills_the_width, bilinear=False
    ),  # cosine attention: its scale is learned
    PvtV2Attention: Forward(SlicedPvtV2Attention, _fills_the_width_at_scale),
    AttentionPoolLatent: Forward(SlicedLatentPool, _fills_what_it_reads),
    EvaAttention: Forward(SlicedEvaAttention, _fills_the_width_at_scale, bilinear=False, buffers=ROTARY),
    AttentionRope: Forward(SlicedRopeAttention, _fills_the_width_at_scale, bilinear=False, buffers=ROTARY),
}

# Sublayers that need another class when no unit is left, beside that of FORWARDS.
EMPTY: dict[type[nn.Module], type[nn.Module]] = {PvtV2Mlp: EmptyPvtV2Mlp}
