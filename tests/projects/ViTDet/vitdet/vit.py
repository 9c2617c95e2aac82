"""A plain ViT over maps, as ViTDet has it: attention in windows, and relative positions of rows and of columns.

Paper: Li et al. 2022, Exploring Plain Vision Transformer Backbones for Object Detection (arXiv 2203.16527).
"""

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import nn


def offsets(table, side):
    """[2 n - 1, C] -> [side, side, C]: for each query and key, the entry of how far they are apart."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.mT[None], size=2 * side - 1, mode="linear")[0].mT
    places = torch.arange(side)
    return table[places[:, None] - places[None, :] + side - 1]


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias, use_rel_pos, side):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))

    def forward(self, x):
        height, width = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, H * W, C]
        logits = self.scale * q @ k.mT
        if self.use_rel_pos:
            maps = q.unflatten(2, (height, width))
            rows = torch.einsum("bnhwc,hkc->bnhwk", maps, offsets(self.rel_pos_h, height))
            columns = torch.einsum("bnhwc,wkc->bnhwk", maps, offsets(self.rel_pos_w, width))
            logits = logits + (rows[..., None] + columns[..., None, :]).flatten(-2).flatten(2, 3)
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj(out.unflatten(1, (height, width)))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, qkv_bias, use_rel_pos, window_size, side):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, use_rel_pos, window_size or side)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.window_size = window_size

    def forward(self, x):
        y = self.norm1(x)
        x = x + (self.in_windows(y) if self.window_size else self.attn(y))
        return x + self.mlp(self.norm2(x))

    def in_windows(self, x):
        height, width = x.shape[1:3]
        side = self.window_size
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # [B, rows, columns, side, side, C]
        grid = x.shape[:3]
        x = self.attn(x.flatten(0, 2)).unflatten(0, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width]


class PatchEmbed(nn.Module):
    def __init__(self, in_chans, embed_dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).permute(0, 2, 3, 1)


@MODELS.register_module()
class ViT(BaseModule):
    """[B, 3, H, W] -> one map [B, C, H / patch, W / patch], and no tuple of it."""

    def __init__(
        self,
        img_size=1024,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        use_abs_pos=True,
        use_rel_pos=False,
        window_size=0,
        window_block_indexes=(0, 1, 3, 4, 6, 7, 9, 10),
        pretrain_img_size=224,
        pretrain_use_cls_token=True,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        positions = (pretrain_img_size // patch_size) ** 2 + pretrain_use_cls_token
        self.pos_embed = nn.Parameter(torch.randn(1, positions, embed_dim)) if use_abs_pos else None
        shape = (embed_dim, num_heads, mlp_ratio, qkv_bias, use_rel_pos)
        windows = [window_size if i in window_block_indexes else 0 for i in range(depth)]
        self.blocks = nn.ModuleList(Block(*shape, side, img_size // patch_size) for side in windows)

    def forward(self, x):
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            positions = self.pos_embed[:, int(self.pretrain_use_cls_token) :]
            side = int(positions.shape[1] ** 0.5)
            positions = positions.mT.unflatten(-1, (side, side))
            if x.shape[1:3] != (side, side):
                positions = F.interpolate(positions, size=x.shape[1:3], mode="bicubic", align_corners=False)
            x = x + positions.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)
