"""Attentions of Hugging Face's ViT, DeiT and DINOv2 for any sizes: in all of them the same code under other names."""

from typing import Any

from torch import Tensor, nn
from transformers.models.deit.modeling_deit import DeiTAttention
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention
from transformers.models.vit.modeling_vit import ViTAttention
from transformers.models.vit.modeling_vit import eager_attention_forward as eager

from sidt.surgery.attention import Forward
from sidt.surgery.forwards.transformers_attention import attend_as, in_heads, of_one_size


class _Sliced(nn.Module):
    """Their attention for any head count, q/k size and v size."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    num_attention_heads: int
    attention_dropout: float
    scaling: float

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Any, Any]:
        """[B, N, C] -> the same, and the weights of attention or ``None``."""
        heads = self.num_attention_heads
        if not heads:
            return self.o_proj(hidden_states[..., :0]), None
        q, k, v = (in_heads(p(hidden_states), heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        drop = self.attention_dropout if self.training else 0.0
        out, weights = attend_as(self, eager, q, k, v, attention_mask, self.scaling, drop, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class SlicedViTAttention(_Sliced, ViTAttention):
    """ViT's."""


class SlicedDeiTAttention(_Sliced, DeiTAttention):
    """DeiT's."""


class SlicedDinov2Attention(_Sliced, Dinov2Attention):
    """DINOv2's."""


FORWARDS: dict[type[nn.Module], Forward] = {
    ViTAttention: Forward(SlicedViTAttention, of_one_size),
    DeiTAttention: Forward(SlicedDeiTAttention, of_one_size),
    Dinov2Attention: Forward(SlicedDinov2Attention, of_one_size),
}
