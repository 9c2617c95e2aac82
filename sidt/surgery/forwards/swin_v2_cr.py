"""The attention of timm's SwinTransformerV2Cr for any head count, q/k size and v size.

Paper: 'Swin Transformer V2: Scaling Up Capacity and Resolution' (https://arxiv.org/abs/2111.09883).
"""

import math

import torch.fx
import torch.nn.functional as F
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv

torch.fx.wrap("attend")  # by the names of a module, whose calls are traced


class SlicedWindowAttention(WindowMultiHeadAttention):
    """Cosine attention in windows, with positions by an MLP, for any head count, q/k size and v size."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows * B, N, C] -> the same; mask is [windows, N, N] or ``None``."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp().view(1, -1, 1, 1)
        bias = self._relative_positional_encodings()
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        drop = self.attn_drop.p if self.training else 0.0
        out = attend(q, F.normalize(k, dim=-1), v, 1.0, bias, drop)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


# Its logits are cosines: no other basis of q and k.
FORWARDS: dict[type[nn.Module], Forward] = {
    WindowMultiHeadAttention: Forward(SlicedWindowAttention, fills_the_width, bilinear=False),
}
