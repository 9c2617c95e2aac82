"""The attention of timm's BEiT for any sizes (Bao et al., BEiT: BERT Pre-Training of Image Transformers)."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.models.beit import Attention
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv
from sidt.surgery.positions import SHARED, own_biases

torch.fx.wrap("attend")  # torch.fx looks for it in each module that calls it


class SlicedBeitAttention(Attention):
    """timm's BEiT attention, with biases of relative positions or without, for any head count, q/k and v size."""

    own_heads: Tensor | None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; the bias that all blocks share is [heads of a dense block, N, N]."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        bias = None if self.q_bias is None else torch.cat([self.q_bias, self.k_bias, self.v_bias])  # type: ignore[list-item]
        q, k, v = split_qkv(F.linear(x, self.qkv.weight, bias), self.num_heads, self.proj.in_features)
        mask = None if shared_rel_pos_bias is None else own_biases(shared_rel_pos_bias, self.own_heads)
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            mask = own if mask is None else own + mask
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, self.scale, mask, drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def _fills_the_width_at_scale(module: Any, heads: int, qk: int, v: int) -> bool:
    return fills_the_width(module, heads, qk, v) and bool(module.scale == qk**-0.5)


FORWARDS: dict[type[nn.Module], Forward] = {
    Attention: Forward(SlicedBeitAttention, _fills_the_width_at_scale, buffers=SHARED)
}
