"""The attentions of timm's XCiT for any sizes (Ali et al., XCiT: Cross-Covariance Image Transformers)."""

import torch.fx
import torch.nn.functional as F
from timm.models.cait import ClassAttn
from timm.models.xcit import XCA
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv
from sidt.surgery.forwards import cait

torch.fx.wrap("attend")  # torch.fx looks for it in each module that calls it


class SlicedCrossCovariance(XCA):
    """timm's attention among the channels of a head, for any head count; q/k and v have one size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))  # type: ignore[no-any-return]
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        q, k = F.normalize(q, dim=2) * self.temperature, F.normalize(k, dim=2)  # over the tokens
        drop = self.attn_drop.p if self.training else 0.0
        x = attend(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3), 1.0, dropout=drop)
        return self.proj_drop(self.proj(x.flatten(1, 2).transpose(1, 2)))  # type: ignore[no-any-return]


FORWARDS: dict[type[nn.Module], Forward] = {
    XCA: Forward(SlicedCrossCovariance, fills_the_width, bilinear=False),
    ClassAttn: cait.FORWARDS[ClassAttn],
}
