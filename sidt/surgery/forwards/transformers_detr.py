"""The attentions of Hugging Face's DETR for any sizes, and that of the Swin that may be its backbone.

Paper: Carion et al. 2020, End-to-End Object Detection with Transformers (arXiv 2005.12872).
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.detr.modeling_detr import DetrCrossAttention, DetrSelfAttention
from transformers.models.detr.modeling_detr import eager_attention_forward as eager

from sidt.surgery.attention import Forward
from sidt.surgery.forwards.transformers_attention import attend_as, in_heads, of_one_size
from sidt.surgery.forwards.transformers_swin import FORWARDS as OF_SWIN


class SlicedDetrSelfAttention(DetrSelfAttention):
    """Theirs, among positions or among queries, for any head count, q/k size and v size."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """[B, N, C] -> the same, and the weights of attention or ``None``; q and k see the positions, v does not."""
        return _attended(
            self, hidden_states, hidden_states, position_embeddings, position_embeddings, attention_mask, **kwargs
        )


class SlicedDetrCrossAttention(DetrCrossAttention):
    """Theirs, of queries to positions, for any head count, q/k size and v size."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        encoder_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """[B, queries, C] and [B, N, C] -> [B, queries, C], and the weights of attention or ``None``."""
        own, seen = position_embeddings, encoder_position_embeddings
        return _attended(self, hidden_states, key_value_states, own, seen, attention_mask, **kwargs)


def _attended(
    attention: Any,
    x: Tensor,
    seen: Tensor,
    own_places: Tensor | None,
    places: Tensor | None,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    heads = attention.q_proj.out_features // max(attention.head_dim, 1)  # the module does not say how many
    if not heads:
        return attention.o_proj(x[..., :0]), None
    q = in_heads(attention.q_proj(x if own_places is None else x + own_places), heads)
    k = in_heads(attention.k_proj(seen if places is None else seen + places), heads)
    v = in_heads(attention.v_proj(seen), heads)
    drop = attention.attention_dropout if attention.training else 0.0
    out, weights = attend_as(attention, eager, q, k, v, mask, attention.scaling, drop, **kwargs)
    return attention.o_proj(out.flatten(2)), weights


FORWARDS: dict[type[nn.Module], Forward] = {
    **OF_SWIN,
    DetrSelfAttention: Forward(SlicedDetrSelfAttention, of_one_size),
    DetrCrossAttention: Forward(SlicedDetrCrossAttention, of_one_size),
}
