"""The attentions of timm's Hiera and of SAM 2's, whose queries may be pooled, for any head count, q/k size and v size.

Paper: 'Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles' (https://arxiv.org/abs/2306.00989).
"""

from typing import Any

import torch.fx
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention
from torch import Tensor, nn

from sidt.surgery.attention import Forward, attend, fills_the_width, split_qkv

torch.fx.wrap("attend")  # by the names of a module, whose calls are traced


class SlicedMaskUnitAttention(MaskUnitAttention):
    """Hiera's attention within mask units, or among all tokens, for any head count, q/k size and v size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N / q_stride, C']; the tokens of a unit are as far apart as there are units."""
        tokens = x.shape[1]
        if not self.heads:
            return self.proj(x[:, : tokens // self.q_stride, :0])  # type: ignore[no-any-return]
        units = tokens // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        q, k, v = split_qkv(self.qkv(x), self.heads, self.proj.in_features)  # [B, heads, N, size]
        q, k, v = (t.unflatten(2, [-1, units]).permute(0, 3, 1, 2, 4).flatten(0, 1) for t in (q, k, v))
        if self.q_stride > 1:  # all are [B * units, heads, N / units, size]: ONNX has no attention of five axes
            q = q.unflatten(2, [self.q_stride, -1]).amax(2)
        out = attend(q, k, v, self.scale).unflatten(0, [-1, units])
        return self.proj(out.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2))  # type: ignore[no-any-return]


class SlicedMultiScaleAttention(MultiScaleAttention):
    """SAM 2's attention within windows, or among all tokens, for any head count, q/k size and v size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H', W', C'], with H' and W' those of the pooled queries."""
        if not self.num_heads:
            if self.q_pool is not None:
                x = self.q_pool(x[..., :1].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.proj(x[..., :0])  # type: ignore[no-any-return]
        qkv = self.qkv(x)
        v_width = self.proj.in_features
        qk_width = (qkv.shape[-1] - v_width) // 2
        q, k, v = torch.split(qkv, [qk_width, qk_width, v_width], dim=-1)  # [B, H, W, heads * size]
        if self.q_pool is not None:
            q = self.q_pool(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        size = q.shape[1:3]
        q, k, v = (t.flatten(1, 2).unflatten(-1, [self.num_heads, -1]).transpose(1, 2) for t in (q, k, v))
        out = attend(q, k, v, self.scale).transpose(1, 2).flatten(2)
        return self.proj(out.unflatten(1, size))  # type: ignore[no-any-return]


def _as_before(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes what it had: its class repeats the sizes."""
    return fills_the_width(module, heads, qk, v) and bool(module.dim_out == heads * v and module.scale == qk**-0.5)


# Queries are pooled by their largest values, which are others in another basis.
FORWARDS: dict[type[nn.Module], Forward] = {
    MaskUnitAttention: Forward(SlicedMaskUnitAttention, _as_before, bilinear=False),
    MultiScaleAttention: Forward(SlicedMultiScaleAttention, _as_before, bilinear=False),
}
