"""The attention of timm's MViTv2, whose queries, keys and values are pooled, for any head count.

Paper: 'MViTv2: Improved Multiscale Vision Transformers for Classification and Detection'
(https://arxiv.org/abs/2112.01526).
"""

import torch.fx
from timm.models.mvitv2 import MultiScaleAttention, cal_rel_pos_type, reshape_post_pool, reshape_pre_pool
from torch import Tensor, nn

from sidt.surgery.attention import Forward, fills_the_width, split_qkv

torch.fx.wrap("reshape_pre_pool")  # as timm has them: they look at sizes
torch.fx.wrap("reshape_post_pool")
torch.fx.wrap("cal_rel_pos_type")


class SlicedMultiScaleAttention(MultiScaleAttention):
    """MViTv2's attention for any head count."""

    def forward(self, x: Tensor, feat_size: list[int]) -> tuple[Tensor, list[int]]:
        """[B, N, C] and H, W -> [B, N', C'] and H', W' of the pooled queries."""
        q_size, k_size = feat_size, feat_size
        if not self.num_heads:
            if self.pool_q is not None:
                stride, padding, kernel = self.pool_q.stride, self.pool_q.padding, self.pool_q.kernel_size
                height = (feat_size[0] + 2 * int(padding[0]) - kernel[0]) // stride[0] + 1  # type: ignore[index]
                width = (feat_size[1] + 2 * int(padding[1]) - kernel[1]) // stride[1] + 1  # type: ignore[index]
                q_size = [height, width]
            tokens = q_size[0] * q_size[1] + int(self.has_cls_token)
            return self.proj(x[:, :tokens, :0]), q_size
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.proj.in_features)
        if self.pool_q is not None:
            q, q_token = reshape_pre_pool(q, feat_size, self.has_cls_token)
            q, q_size = reshape_post_pool(self.pool_q(q), self.num_heads, q_token)
        if self.norm_q is not None:
            q = self.norm_q(q)
        if self.pool_k is not None:
            k, k_token = reshape_pre_pool(k, feat_size, self.has_cls_token)
            k, k_size = reshape_post_pool(self.pool_k(k), self.num_heads, k_token)
        if self.norm_k is not None:
            k = self.norm_k(k)
        if self.pool_v is not None:
            v, v_token = reshape_pre_pool(v, feat_size, self.has_cls_token)
            v, _ = reshape_post_pool(self.pool_v(v), self.num_heads, v_token)
        if self.norm_v is not None:
            v = self.norm_v(v)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.rel_pos_type == "spatial":
            logits = cal_rel_pos_type(logits, q, self.has_cls_token, q_size, k_size, self.rel_pos_h, self.rel_pos_w)
        out = logits.softmax(dim=-1) @ v
        if self.residual_pooling:
            out = out + q
        return self.proj(out.transpose(1, 2).flatten(2)), q_size


FORWARDS: dict[type[nn.Module], Forward] = {
    MultiScaleAttention: Forward(SlicedMultiScaleAttention, fills_the_width, bilinear=False),
}
