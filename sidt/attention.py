"""Attention forwards that take pruned heads, and q/k sizes that differ from v sizes.

timm's attentions derive every size from one head size, and the fused kernel takes its scale from the q size
it sees. These subclasses read the sizes from the weights and pass on the scale of the dense model. They add
no parameter and keep every name, so state dicts are those of the plain modules.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention as VitAttention
from timm.models.pvt_v2 import Attention as PvtV2Attention
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from torch import Tensor, nn

from sidt.errors import InputError


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, heads * size] -> [B, heads, N, size]."""
    return x.reshape(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def _split(qkv: Tensor, num_heads: int, v_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 2 * heads * qk + heads * v] -> q, k of [B, heads, N, qk] and v of [B, heads, N, v]."""
    qk_width = (qkv.shape[-1] - v_width) // 2
    q, k, v = torch.split(qkv, [qk_width, qk_width, v_width], dim=-1)
    return _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)


class SlicedVitAttention(VitAttention):
    """timm's ViT attention for any head count, q/k size and v size."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = _split(self.qkv(x), self.num_heads, self.proj.in_features)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask, drop, is_causal, scale=self.scale
        )
        x = self.norm(x.transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


class SlicedSwinAttention(SwinAttention):
    """timm's Swin window attention for any head count, q/k size and v size."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows * B, N, C] -> the same; mask is [windows, N, N] or ``None``."""
        q, k, v = _split(self.qkv(x), self.num_heads, self.proj.in_features)
        bias = self._get_rel_pos_bias()
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, bias, drop, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class SlicedSwinV2Attention(SwinV2Attention):
    """timm's Swin V2 cosine window attention for any head count, q/k size and v size."""

    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows * B, N, C] -> the same; mask is [windows, N, N] or ``None``."""
        bias = None if self.q_bias is None else torch.cat([self.q_bias, self.k_bias, self.v_bias])  # type: ignore[list-item]
        q, k, v = _split(F.linear(x, self.qkv.weight, bias), self.num_heads, self.proj.in_features)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp()
        table = self.cpb_mlp(self.relative_coords_table).reshape(-1, self.num_heads)
        area = self.window_size[0] * self.window_size[1]
        table = table[self.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        position_bias = (16 * torch.sigmoid(table)).unsqueeze(0)
        if mask is not None:
            position_bias = (position_bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, position_bias, drop, scale=1.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class SlicedPvtV2Attention(PvtV2Attention):
    """timm's PVT v2 spatial-reduction attention for any head count, q/k size and v size."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """[B, H * W, C] -> the same; ``feat_size`` is H, W."""
        q = _heads(self.q(x), self.num_heads)
        if self.sr is not None:
            x = x.transpose(1, 2).reshape(x.shape[0], -1, *feat_size)
            x = self.sr(x if self.pool is None else self.pool(x)).flatten(2).transpose(1, 2)
            x = self.norm(x)
            x = x if self.act is None else self.act(x)
        kv = self.kv(x)
        k, v = kv.split((kv.shape[-1] - self.proj.in_features, self.proj.in_features), dim=-1)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            q, _heads(k, self.num_heads), _heads(v, self.num_heads), dropout_p=drop, scale=self.scale
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


_SLICED: dict[type[nn.Module], type[nn.Module]] = {
    VitAttention: SlicedVitAttention,
    SwinAttention: SlicedSwinAttention,
    SwinV2Attention: SlicedSwinV2Attention,
    PvtV2Attention: SlicedPvtV2Attention,
}


def _plain_takes(module: nn.Module, heads: int, qk: int, v: int) -> bool:
    """Whether timm's own forward is right for these sizes: one head size, and the scale is its own."""
    if qk != v:
        return False
    if isinstance(module, VitAttention | SwinAttention):
        return bool(module.scale == qk**-0.5)
    return (
        isinstance(module.proj, nn.Linear)
        and heads * v == module.proj.out_features
        and qk**-0.5 == getattr(module, "scale", qk**-0.5)
    )


def take_sizes(module: nn.Module, heads: int, qk: int, v: int, *, pruned: bool) -> None:
    """Give an attention module, whose weights are already sliced, a forward that takes its sizes.

    Args:
        module: the attention.
        heads: how many heads it has now.
        qk: the size of q and k in each head.
        v: the size of v in each head.
        pruned: whether any of the three is smaller than before; if none is, any class will do.

    Raises:
        InputError: there is no such forward for the module's class.
    """
    if type(module) in _SLICED.values() or (type(module) in _SLICED and _plain_takes(module, heads, qk, v)):
        return
    if type(module) not in _SLICED:
        if not pruned:
            return
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        raise InputError(
            f"no attention forward takes pruned sizes for {name}; add one to sidt/attention.py, "
            f"or search only mlp and width"
        )
    # The class changes and nothing else: weights, names, hooks and scale stay as they are.
    module.__class__ = _SLICED[type(module)]
