"""The attention of Hugging Face's DINOv3 ViT for any sizes: q and k, which rotary positions turn, stay whole."""

from typing import Any

from torch import Tensor, nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention, apply_rotary_pos_emb
from transformers.models.dinov3_vit.modeling_dinov3_vit import eager_attention_forward as eager

from sidt.surgery.attention import Forward
from sidt.surgery.forwards.transformers_attention import attend_as, in_heads, of_one_size


class SlicedDINOv3ViTAttention(DINOv3ViTAttention):
    """Theirs for any head count and v size."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """[B, N, C] -> the same, and the weights of attention or ``None``; positions are cosine and sine."""
        if not self.num_heads:
            return self.o_proj(hidden_states[..., :0]), None
        q, k, v = (in_heads(p(hidden_states), self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        assert position_embeddings is not None
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        drop = self.dropout if self.training else 0.0
        out, weights = attend_as(self, eager, q, k, v, attention_mask, self.scaling, drop, **kwargs)
        return self.o_proj(out.flatten(2)), weights


FORWARDS: dict[type[nn.Module], Forward] = {
    DINOv3ViTAttention: Forward(SlicedDINOv3ViTAttention, of_one_size, bilinear=False)  # positions between q and k
}
