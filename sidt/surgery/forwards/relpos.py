"""timm's attention with a bias of relative positions, for any head count, q/k size and v size."""

from typing import TYPE_CHECKING, Any

import torch.fx
import torch.nn.functional as F
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv
from sidt.surgery.positions import SHARED, own_biases

torch.fx.wrap("attend")  # by the names of a module, whose calls are traced


class Biased(nn.Module):
    """What attentions with a module ``rel_pos`` share. Its class repeats the number of heads in a shape."""

    if TYPE_CHECKING:  # TorchScript would take the annotation for the type
        rel_pos: Any

    def position_bias(self) -> Tensor | None:
        """[1, heads, N, N], or [heads, N, N] of TensorFlow's way, which asks for no number of heads."""
        if self.rel_pos is None:
            return None
        if hasattr(self.rel_pos, "height_lookup"):
            return self.rel_pos.get_bias()  # type: ignore[no-any-return]
        prefix = 0
        if hasattr(self.rel_pos, "mlp"):
            table = self.rel_pos.mlp(self.rel_pos.rel_coords_log).flatten(0, 1)
            prefix = self.rel_pos.prefix_tokens
        else:
            table = self.rel_pos.relative_position_bias_table
        tokens = self.rel_pos.bias_shape[0]
        bias = table[self.rel_pos.relative_position_index].view(tokens, tokens, -1).permute(2, 0, 1)
        if hasattr(self.rel_pos, "bias_act"):
            bias = self.rel_pos.bias_act(bias)
            if self.rel_pos.bias_gain is not None:
                bias = self.rel_pos.bias_gain * bias
        if prefix:
            bias = F.pad(bias, [prefix, 0, prefix, 0])
        return bias.unsqueeze(0).contiguous()  # type: ignore[no-any-return]


class SlicedRelPosAttention(RelPosAttention, Biased):
    """timm's attention of ViTs with relative positions, its own or those that all blocks share."""

    own_heads: Tensor | None

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; the shared bias is [1, heads of a dense block, N, N] or ``None``."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        bias = self.position_bias()
        if bias is None and shared_rel_pos is not None:
            bias = own_biases(shared_rel_pos, self.own_heads)
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(self.q_norm(q), self.k_norm(k), v, self.scale, bias, drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def as_before(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes what it had: the bias repeats the number of heads."""
    return fills_the_width(module, heads, qk, v) and heads == module.num_heads and module.scale == qk**-0.5


FORWARDS: dict[type[nn.Module], Forward] = {RelPosAttention: Forward(SlicedRelPosAttention, as_before, buffers=SHARED)}
