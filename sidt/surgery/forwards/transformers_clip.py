"""Attentions of Hugging Face's CLIP and SigLIP for any sizes, and torch's own by which SigLIP pools."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.clip.modeling_clip import eager_attention_forward as eager
from transformers.models.siglip.modeling_siglip import SiglipAttention

from sidt.surgery.attention import Forward, attend
from sidt.surgery.forwards.transformers_attention import attend_as, in_heads, of_one_size

torch.fx.wrap("attend")  # torch.fx looks for it in each module that calls it


class _Sliced(nn.Module):
    """Their attention for any head count, q/k size and v size."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    num_heads: int
    dropout: Any
    scale: float

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Any, Any]:
        """[B, N, C] -> the same, and the weights of attention or ``None``."""
        if not self.num_heads:
            return self.out_proj(hidden_states[..., :0]), None
        q, k, v = (in_heads(p(hidden_states), self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        drop = self.dropout if self.training else 0.0
        out, weights = attend_as(self, eager, q, k, v, attention_mask, self.scale, drop, **kwargs)
        return self.out_proj(out.flatten(2)), weights


class SlicedCLIPAttention(_Sliced, CLIPAttention):
    """CLIP's."""


class SlicedSiglipAttention(_Sliced, SiglipAttention):
    """SigLIP's."""


class SlicedPoolingAttention(nn.MultiheadAttention):
    """Torch's attention as SigLIP's pooling calls it, for any head count, q/k size and v size."""

    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """[B, 1, C] of the learned query, and twice [B, N, C] -> [B, 1, pooled], and no weights of attention."""
        if not self.num_heads:
            return self.out_proj(query[..., :0]), None
        v_width = self.out_proj.in_features
        qk_width = (self.in_proj_weight.shape[0] - v_width) // 2
        weights, biases = (
            torch.split(t, [qk_width, qk_width, v_width]) for t in (self.in_proj_weight, self.in_proj_bias)
        )
        given = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (in_heads(F.linear(x, w, b), self.num_heads) for x, w, b in given)
        drop = self.dropout if self.training else 0.0
        return self.out_proj(attend(q, k, v, self.scale, dropout=drop).transpose(1, 2).flatten(2)), None


def _is_whole(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes what torch's takes: q, k and v that together have the width of what it reads, and gives it."""
    return bool(heads * v == module.embed_dim == module.out_proj.out_features and qk == v)


def _scale(module: Any) -> float:
    return float(module.head_dim**-0.5)


FORWARDS: dict[type[nn.Module], Forward] = {
    CLIPAttention: Forward(SlicedCLIPAttention, of_one_size),
    SiglipAttention: Forward(SlicedSiglipAttention, of_one_size),
    nn.MultiheadAttention: Forward(SlicedPoolingAttention, _is_whole, _scale),
}
