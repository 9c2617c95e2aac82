"""The layer of Hugging Face's BEiT for any sizes: its biases of relative positions stand beside its attention."""

from typing import Any

from torch import Tensor, nn
from transformers.models.beit.modeling_beit import BeitAttention, BeitLayer
from transformers.models.beit.modeling_beit import eager_attention_forward as eager

from sidt.surgery.attention import Forward
from sidt.surgery.forwards.transformers_attention import attend_as, in_heads, of_one_size
from sidt.surgery.positions import SHARED, own_biases


class SlicedBeitLayer(BeitLayer):
    """Theirs for any head count, q/k size and v size."""

    own_heads: Tensor | None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, N, C] -> the same; the resolution is height and width of the images."""
        mask = attention_mask
        if self.relative_position_bias is not None and self.attention.num_attention_heads:
            assert resolution is not None
            patch: Any = self.patch_size
            window = (resolution[0] // patch, resolution[1] // patch)
            mask = self.relative_position_bias(window, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
            mask = mask if attention_mask is None else mask + _own(attention_mask, self.own_heads)
        out, _ = _attended(self.attention, self.layernorm_before(hidden_states), mask, **kwargs)
        hidden_states = self.drop_path(self.lambda_1 * self.dropout(out)) + hidden_states
        out = self.mlp(self.layernorm_after(hidden_states))
        return self.drop_path(self.lambda_2 * self.dropout(out)) + hidden_states


class SlicedBeitAttention(BeitAttention):
    """The attention of a layer without such biases, for any head count, q/k size and v size."""

    own_heads: Tensor | None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Any, Any]:
        """[B, N, C] -> the same, and the weights of attention or ``None``."""
        mask = None if attention_mask is None else _own(attention_mask, self.own_heads)
        return _attended(self, hidden_states, mask, **kwargs)


def _own(mask: Tensor, heads: Tensor | None) -> Tensor:
    """A mask of any heads [B, 1, N, N], or biases of the dense model's heads [1, heads, N, N], for those there are."""
    return mask if mask.shape[1] == 1 else own_biases(mask, heads)


def _attended(attention: BeitAttention, x: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    heads = attention.num_attention_heads
    if not heads:
        return attention.o_proj(x[..., :0]), None
    q, k, v = (in_heads(p(x), heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    drop = attention.attention_dropout if attention.training else 0.0
    out, weights = attend_as(attention, eager, q, k, v, mask, attention.scaling, drop, **kwargs)
    return attention.o_proj(out.flatten(2)), weights


FORWARDS: dict[type[nn.Module], Forward] = {
    BeitLayer: Forward(SlicedBeitLayer, of_one_size, buffers=SHARED),
    BeitAttention: Forward(SlicedBeitAttention, of_one_size, buffers=SHARED),
}
