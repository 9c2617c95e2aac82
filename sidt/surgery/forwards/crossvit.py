"""The attentions of timm's CrossViT for any sizes (Chen et al., CrossViT: Cross-Attention Multi-Scale ViT)."""

import torch.fx
from timm.layers.attention import Attention as VitAttention
from timm.models.crossvit import CrossAttention
from torch import Tensor, nn

from sidt.surgery import attention
from sidt.surgery.attention import Forward, attend, fills_the_width

torch.fx.wrap("attend")  # torch.fx looks for it in each module that calls it


class SlicedCrossAttention(CrossAttention):
    """timm's attention of a class token to another branch for any head count, q/k size and v size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C], of which the class token is the first -> [B, 1, C]."""
        first = x[:, :1]
        if not self.num_heads:
            return self.proj_drop(self.proj(first[..., :0]))  # type: ignore[no-any-return]
        q, k, v = [
            each.unflatten(-1, [self.num_heads, -1]).transpose(1, 2)
            for each in (self.wq(first), self.wk(x), self.wv(x))
        ]
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, self.scale, dropout=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


FORWARDS: dict[type[nn.Module], Forward] = {
    VitAttention: attention.FORWARDS[VitAttention],
    CrossAttention: Forward(SlicedCrossAttention, fills_the_width),  # its scale is its own
}
