"""The attentions of timm's CaiT for any sizes (Touvron et al., Going Deeper with Image Transformers)."""

from typing import Any

import torch.fx
from timm.models.cait import ClassAttn, TalkingHeadAttn
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv

torch.fx.wrap("attend")  # torch.fx looks for it in each module that calls it


class SlicedTalkingHeads(TalkingHeadAttn):
    """timm's talking heads for any head count, q/k size and v size: the heads that stay are mixed."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        attention = self.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        attention = self.attn_drop(self.proj_w(attention.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.proj_drop(self.proj((attention @ v).transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class SlicedClassAttention(ClassAttn):
    """timm's attention of the class token alone for any head count, q/k size and v size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C], of which the class token is the first -> [B, 1, C]."""
        first = x[:, :1]
        if not self.num_heads:
            return self.proj_drop(self.proj(first[..., :0]))  # type: ignore[no-any-return]
        q, k, v = [
            each.unflatten(-1, [self.num_heads, -1]).transpose(1, 2) for each in (self.q(first), self.k(x), self.v(x))
        ]
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, self.scale, dropout=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def fills_the_width_at_scale(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes heads that together have the width, of the size that the scale is of."""
    return fills_the_width(module, heads, qk, v) and bool(module.scale == qk**-0.5)


FORWARDS: dict[type[nn.Module], Forward] = {
    TalkingHeadAttn: Forward(SlicedTalkingHeads, fills_the_width),  # its scale is its own
    ClassAttn: Forward(SlicedClassAttention, fills_the_width_at_scale),
}
