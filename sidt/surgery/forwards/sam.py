"""The attention of timm's SAM, with relative positions that q is multiplied by, for any head count and v size."""

from typing import Any

import torch.fx
from timm.models.vision_transformer_sam import Attention, get_decomposed_rel_pos_bias
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv
from sidt.surgery.positions import ROTARY, own_angles, turned

torch.fx.wrap("attend")  # by the names of a module, whose calls are traced


class SlicedSamAttention(Attention):
    """timm's attention of SAM for any head count and v size, and any pairs of q/k where rotary positions turn them."""

    # Without them it has no tables, and TorchScript looks at both ways.
    use_rel_pos: torch.jit.Final[bool]  # type: ignore[name-defined]
    turned: Tensor | None
    turned_heads: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        height, width = x.shape[1], x.shape[2]
        q, k, v = split_qkv(self.qkv(x.flatten(1, 2)), self.num_heads, self.proj.in_features)
        q, k = self.q_norm(q), self.k_norm(k)
        bias: Tensor | None = None
        if self.use_rel_pos:
            bias = get_decomposed_rel_pos_bias(
                q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, (height, width), (height, width)
            ).unflatten(0, [-1, self.num_heads])
        elif self.rope is not None:
            rope = own_angles(self.rope.get_embed(), self.turned_heads, self.turned, self.num_heads)  # type: ignore[operator]
            q, k = turned(q, rope, 0, False), turned(k, rope, 0, False)
        out = attend(q, k, v, self.scale, bias, self.attn_drop.p if self.training else 0.0)
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return out.unflatten(1, [height, width])  # type: ignore[no-any-return]


def _as_before(module: Any, heads: int, qk: int, v: int) -> bool:
    return fills_the_width(module, heads, qk, v) and bool(module.scale == qk**-0.5)


FORWARDS: dict[type[nn.Module], Forward] = {
    Attention: Forward(SlicedSamAttention, _as_before, bilinear=False, buffers=ROTARY)
}
