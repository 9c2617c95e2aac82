"""The backbones that the suites run over, and random plans for them."""

import importlib
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import timm
import torch
from timm.layers import LayerNorm, SwiGLU
from timm.layers.attention import Attention
from torch import nn

from sidt.space.families import KINDS
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import InputSize


@dataclass(frozen=True)
class Backbone:
    """One model, built small: timm's, which gives logits, or MMDetection's, which gives a map for each stage.

    ``gated`` gives its attentions timm's output gate, which no name has.
    """

    name: str
    kwargs: dict = field(default_factory=dict, hash=False)
    input_size: InputSize | None = None
    label: str = ""
    gated: bool = False
    source: Literal["timm", "mmdet"] = "timm"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.source if self.source != "timm" else "", self.name, self.label)))

    def create(self, **kwargs) -> nn.Module:
        """A model as its library makes it."""
        if self.source == "timm":
            return timm.create_model(self.name, **kwargs)
        return getattr(importlib.import_module("mmdet.models.backbones"), self.name)(**kwargs)

    def build(self, *, seed: int = 0) -> nn.Module:
        """A model of its own, in eval mode."""
        torch.manual_seed(seed)
        model = self.create(**self.kwargs | ({"num_classes": 10} if self.source == "timm" else {}))
        if self.gated:
            for block in model.blocks:
                block.attn = Attention(model.embed_dim, block.attn.num_heads, qkv_bias=True, gated=True)
        shake(model)
        model.eval()  # nothing comes back from MMDetection's Swin
        return model

    def images(self, batch: int = 2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(batch, *dense(self)[1].trace.input_size, generator=generator)


def shake(model: nn.Module) -> nn.Module:
    """Move every parameter off its trivial start, so that biases, norms, layer scales and tables matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 + 0.5 * torch.rand_like(parameter))
    return model


@cache
def dense(backbone: Backbone) -> tuple[nn.Module, DimensionSpace]:
    """A shared model with its space; surgery is out of place, so nothing may change it."""
    model = backbone.build()
    return model, space_for(model, backbone.input_size)


def random_plan(space: DimensionSpace, seed: int, kinds=KINDS, empty=()) -> DimensionPlan:
    """Every dimension of ``kinds`` loses units where it can (width, at most half), and qk differs from v.

    Those named in ``empty`` lose all of them.
    """
    rng = np.random.default_rng(seed)
    keep: dict[str, np.ndarray] = {}
    for name, dimension in space.dimensions.items():
        if dimension.kind not in kinds or dimension.fixed:
            continue
        least = (dimension.size + 1) // 2 if dimension.kind == "width" else 1
        choices = list(range(least, dimension.size)) or [dimension.size]
        if dimension.kind == "v":
            qk = np.shape(keep.get(name.replace("v", "qk", 1)))[-1:]
            choices = [c for c in choices if (c,) != qk] or choices
        count = 0 if name in empty else int(rng.choice(choices))
        if dimension.per is None:
            keep[name] = rng.permutation(dimension.size)[:count]
        else:
            parents = len(keep.get(dimension.per, range(space.sizes[dimension.per])))
            rows = [rng.permutation(dimension.size)[:count] for _ in range(parents)]
            keep[name] = np.stack(rows) if rows else np.empty((0, count), dtype=int)
    return DimensionPlan(space, keep)


def sublayers(space: DimensionSpace, which: str) -> set[str]:
    """The heads of one block and the MLP of another (``apart``), or both of one block (``together``), that may go.

    The blocks are at both ends or, in a model with shifted windows, one that shifts them.
    """
    blocks = [block for block in space.blocks() if block]
    middle = blocks[len(blocks) // 3]  # of 6 blocks in stages of 1, 2, 2 and 1 the second of stage 1
    heads, hidden = (blocks[0], blocks[-1]) if which == "apart" else (middle, middle)
    wanted = {".".join(["heads", *map(str, heads)]), ".".join(["hidden", *map(str, hidden)])}
    wanted |= {"pool_hidden"} & set(space.dimensions)  # without its heads, nothing would see the image
    return {name for name in wanted if not space.dimensions[name].fixed}


VIT = {"depth": 2, "img_size": 64}
DINO = {"depth": 2, "img_size": 56}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}
TIMM_BACKBONES = (
    Backbone("vit_tiny_patch16_224", VIT),
    Backbone("deit_tiny_patch16_224", VIT),
    Backbone("deit_tiny_distilled_patch16_224", VIT),
    Backbone("deit3_small_patch16_224", VIT),  # LayerScale
    Backbone("vit_base_patch16_clip_224", VIT),  # pre-norm
    Backbone("vit_small_patch14_dinov2", DINO),
    Backbone("vit_small_patch14_reg4_dinov2", DINO),  # register tokens
    Backbone("vit_giant_patch14_dinov2", SMALL | {"img_size": 28, "mlp_ratio": 4}),  # packed SwiGLU
    Backbone("vit_tiny_patch16_224", VIT | {"mlp_layer": SwiGLU}, label="swiglu"),
    Backbone("vit_tiny_patch16_224", VIT | {"qk_norm": True}, label="qk_norm"),
    Backbone("vit_tiny_patch16_224", VIT, label="gated", gated=True),
    Backbone("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "embed_norm_layer": LayerNorm}, label="avg"),
    Backbone("beit3_base_patch16_224", VIT | SMALL),  # norms inside attention and MLP
    Backbone("aimv2_large_patch14_224", DINO | SMALL),  # RmsNorm, no biases
    Backbone("vit_base_patch16_siglip_224", VIT | SMALL),  # pooled by attention
    Backbone("vit_so150m_patch16_reg4_map_256", VIT | SMALL),  # the same, after register tokens
    Backbone("eva_giant_patch14_224", DINO | SMALL | {"mlp_ratio": 4}),
    Backbone("eva02_tiny_patch14_224", DINO),  # rotary positions, packed SwiGLU
    Backbone("eva02_base_patch14_224", DINO | SMALL),  # q, k and v apart, a norm inside the MLP
    Backbone("vit_small_patch16_dinov3_qkvb", VIT),  # rotary halves
    Backbone("vit_huge_plus_patch16_dinov3", VIT | SMALL),  # SwiGLU of two layers
    Backbone("vit_small_patch16_rope_224", VIT),  # another class of attention
    Backbone("vit_pe_core_tiny_patch16_384", VIT),  # pooled by attention
    Backbone("swin_tiny_patch4_window7_224", {"depths": (1, 2, 2, 1), "img_size": 112, "embed_dim": 48}),
    Backbone("swinv2_tiny_window8_256", {"depths": (1, 2, 2, 1), "img_size": 128, "embed_dim": 48}),
    Backbone("pvt_v2_b0", {"depths": (1, 1, 2, 1)}, (3, 64, 64)),
    Backbone("pvt_v2_b2_li", {"depths": (1, 1, 2, 1)}, (3, 64, 64)),  # linear attention
)
VIT_TINY = TIMM_BACKBONES[0]
DISTILLED = TIMM_BACKBONES[2]
SWIN, SWIN_V2, PVT = TIMM_BACKBONES[-4:-1]

SMALL_SWIN = {"embed_dims": 24, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4), "window_size": 4}
PLAIN = {"use_abs_pos_embed": True, "pretrain_img_size": 64, "patch_norm": False, "qkv_bias": False}
SMALL_PVT = {"embed_dims": 8, "num_layers": (1, 1, 2, 1)}
MMDET_BACKBONES = (
    Backbone("SwinTransformer", SMALL_SWIN, (3, 86, 70), source="mmdet"),  # every stage is padded to whole windows
    Backbone("SwinTransformer", SMALL_SWIN | PLAIN, (3, 64, 64), "plain", source="mmdet"),
    Backbone("PyramidVisionTransformerV2", SMALL_PVT, (3, 86, 70), source="mmdet"),
    Backbone("PyramidVisionTransformerV2", SMALL_PVT | {"qkv_bias": False}, (3, 64, 64), "plain", source="mmdet"),
)
MMDET_SWIN, MMDET_PVT = MMDET_BACKBONES[0], MMDET_BACKBONES[2]
BACKBONES = TIMM_BACKBONES + MMDET_BACKBONES
