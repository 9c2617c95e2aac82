"""The attention in windows of Hugging Face's Swin for any sizes."""

from typing import Any

from torch import Tensor, nn
from transformers.models.swin.modeling_swin import SwinAttention
from transformers.models.swin.modeling_swin import eager_attention_forward as eager

from sidt.surgery.attention import Forward
from sidt.surgery.forwards.transformers_attention import attend_as, in_heads, of_one_size


class SlicedSwinAttention(SwinAttention):
    """Theirs for any head count, q/k size and v size."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Any, Any]:
        """[B * windows, N, C] -> the same, and the weights of attention or ``None``; the mask is [windows, N, N]."""
        heads = self.num_attention_heads
        if not heads:
            return self.o_proj(hidden_states[..., :0]), None
        q, k, v = (in_heads(p(hidden_states), heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        mask = self.relative_position_bias()
        if attention_mask is not None:
            images = hidden_states.shape[0] // attention_mask.shape[0]
            mask = mask + attention_mask.unsqueeze(1).repeat(images, 1, 1, 1)
        drop = self.attention_dropout if self.training else 0.0
        out, weights = attend_as(self, eager, q, k, v, mask, self.scaling, drop, **kwargs)
        return self.o_proj(out.flatten(2)), weights


FORWARDS: dict[type[nn.Module], Forward] = {SwinAttention: Forward(SlicedSwinAttention, of_one_size)}
