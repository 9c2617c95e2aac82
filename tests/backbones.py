"""The backbones that the suites run over, and random plans for them."""

import importlib
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import timm
import torch
from timm.layers import LayerNorm, SwiGLU
from timm.layers.attention import Attention
from timm.models import mvitv2
from torch import nn

from sidt.space.families import KINDS
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import InputSize


@dataclass(frozen=True)
class Backbone:
    """One model, built small: timm's, which gives logits, or MMDetection's, which gives a map for each stage.

    That of ViTDet's project, of which ``tests/projects`` has a stand-in, gives one map.
    Hugging Face's give a mapping with logits, or with tokens and what is pooled; ``kwargs`` are its config's.

    ``gated`` gives its attentions timm's output gate, which no name has.
    """

    name: str
    kwargs: dict = field(default_factory=dict, hash=False)
    input_size: InputSize | None = None
    label: str = ""
    gated: bool = False
    source: Literal["timm", "mmdet", "vitdet", "transformers"] = "timm"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.source if self.source != "timm" else "", self.name, self.label)))

    def create(self, **kwargs) -> nn.Module:
        """A model as its library makes it."""
        if self.source == "timm":
            return timm.create_model(self.name, **kwargs)
        if self.source == "transformers":
            cls = getattr(importlib.import_module("transformers"), self.name)
            return cls(cls.config_class(**kwargs))
        module = "projects.ViTDet.vitdet.vit" if self.source == "vitdet" else "mmdet.models.backbones"
        return getattr(importlib.import_module(module), self.name)(**kwargs)

    def build(self, *, seed: int = 0) -> nn.Module:
        """A model of its own, in eval mode."""
        torch.manual_seed(seed)
        model = self.create(**self.kwargs | self.classes(10))
        if self.gated:
            for block in model.blocks:
                block.attn = Attention(model.embed_dim, block.attn.num_heads, qkv_bias=True, gated=True)
        shake(model)
        model.eval()  # nothing comes back from MMDetection's Swin
        return model

    def classes(self, count: int) -> dict[str, int]:
        """The argument for so many classes, of a model that has any."""
        if self.source == "transformers":
            return {"num_labels": count} if "Classification" in self.name else {}
        return {"num_classes": count} if self.source == "timm" else {}

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
    blocks = [b for b in space.blocks() if b and ".".join(["heads", *map(str, b)]) in space.dimensions]
    if not blocks:  # ViT's parallel blocks, whose dimensions have names of their own
        of = {kind: [d.name for d in space.dimensions.values() if d.kind == kind] for kind in ("heads", "mlp")}
        return {of["heads"][0], of["mlp"][-1]}
    middle = blocks[len(blocks) // 3]  # of 6 blocks in stages of 1, 2, 2 and 1 the second of stage 1
    heads, hidden = (blocks[0], blocks[-1]) if which == "apart" else (middle, middle)
    return {
        d.name
        for d in space.dimensions.values()
        if not d.fixed and ((d.kind, d.index) in {("heads", heads), ("mlp", hidden)} or d.name == "pool_hidden")
    }  # not the heads of a pooling: without them, nothing would see the image


VIT = {"depth": 2, "img_size": 64}
DINO = {"depth": 2, "img_size": 56}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}
SMALL_TWINS = {"embed_dims": [16, 24, 32, 48], "num_heads": [2, 2, 4, 4], "depths": [1, 1, 1, 1], "img_size": 64}
SMALL_CROSSVIT = {
    "img_size": 48,
    "img_scale": (1.0, 2 / 3),
    "embed_dim": [24, 32],
    "num_heads": [4, 4],
    "depth": [[1, 1, 0]],
}
SMALL_VOLO = {"img_size": 32, "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}  # it does not say its size
# All kinds of blocks of MaxViT and CoAtNet: attentions over windows, a grid, both beside each other, and the whole map.
COAT = {"img_size": 64, "transformer_dim_head": 16, "stem_width": (8, 24), "embed_dim": (48, 48, 96, 48)}
CONVNEXT = {
    "conv_block_type": "convnext",
    "conv_norm_layer": "layernorm2d",
    "conv_init_values": 0.5,
    "transformer_rel_pos_type": "mlp",
    "transformer_init_values": 0.5,
    "head_hidden_size": 48,
}
TENSORFLOW = {
    "transformer_rel_pos_type": "bias_tf",
    "transformer_head_first": False,
    "conv_attn_early": True,
    "conv_output_bias": True,
    "stem_bias": True,
}
# MViTv2 takes no sizes but by the name of a config.
SMALL_MVIT = {"embed_dim": (16, 24, 32, 48), "num_heads": (1, 2, 4, 4), "depths": (1, 2, 2, 1)}
mvitv2.model_cfgs["small"] = mvitv2.MultiScaleVitCfg(**SMALL_MVIT)
mvitv2.model_cfgs["small_late"] = mvitv2.MultiScaleVitCfg(**SMALL_MVIT, use_cls_token=True, expand_attn=False)
SMALL_SWIN_CR = {"embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4)}
SMALL_DAVIT = {"embed_dims": (16, 24, 32, 48), "num_heads": (2, 2, 4, 4), "depths": (1, 1, 1, 1), "window_size": 4}
SMALL_PIT = {"img_size": 64, "base_dims": (8, 8, 8), "heads": (2, 4, 8), "depth": (1, 1, 1)}
SMALL_SAM = {"window_size": 3, "global_attn_indexes": (1,), "init_values": 0.5}
SMALL_HIERA = {"embed_dim": 16, "num_heads": 2, "stages": (1, 2, 1, 1)}
SMALL_TOWER = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 4, "out_features": 32}  # of language models
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
    Backbone("eva02_base_patch16_clip_224", VIT | SMALL),  # norms inside attention and MLP, rotary positions
    Backbone("vit_small_patch16_dinov3_qkvb", VIT),  # rotary halves
    Backbone("vit_huge_plus_patch16_dinov3", VIT | SMALL),  # SwiGLU of two layers
    Backbone("vit_small_patch16_rope_224", VIT),  # another class of attention
    Backbone("vit_pe_core_tiny_patch16_384", VIT),  # pooled by attention
    Backbone("mvitv2_tiny", {"img_size": 64, "cfg_variant": "small"}, (3, 64, 64)),
    Backbone("mvitv2_large", {"img_size": 64, "cfg_variant": "small_late"}, (3, 64, 64)),  # MLPs project, class token
    Backbone("swinv2_cr_tiny_ns_224", SMALL_SWIN_CR | {"img_size": 56, "window_size": 7}),
    Backbone("swinv2_cr_tiny_224", SMALL_SWIN_CR | {"img_size": 64, "window_size": 4, "extra_norm_period": 1}),
    Backbone("davit_small", SMALL_DAVIT, (3, 64, 64)),
    Backbone("davit_base_fl", SMALL_DAVIT | {"head_norm_first": True}, (3, 64, 64)),  # another attention among channels
    Backbone("pit_ti_224", SMALL_PIT),
    Backbone("vit_small_patch16_18x2_224", VIT | SMALL),  # two attentions and two MLPs in each block
    Backbone("vit_base_patch16_xp_224", VIT | SMALL),  # attention and MLP side by side, in one layer
    Backbone("vit_pwee_patch16_reg1_gap_256", VIT | SMALL | {"qk_norm": True}),  # the same with other biases
    Backbone("vit_dlittle_patch16_reg1_gap_256", VIT | SMALL),  # differential attention
    Backbone("vit_dpwee_patch16_reg1_gap_256", VIT | SMALL),  # the same beside its MLP
    Backbone("vit_tiny_r_s16_p8_224", VIT | SMALL),  # a ResNet's stem before its patches
    Backbone("vit_base_mci_224", VIT | {"num_heads": 4, "mlp_ratio": 0.25}),  # convolutions write the width
    Backbone("vitamin_small_224", VIT | {"num_heads": 4, "mlp_ratio": 0.5}),  # a GEGLU behind a norm
    Backbone("vit_small_patch16_rope_mixed_224", VIT | SMALL),  # rotary positions that are learned, of each head
    Backbone("naflexvit_base_patch16_parfac_gap", SMALL, (3, 64, 64)),  # positions of rows and of columns
    Backbone("naflexvit_base_patch16_map", SMALL, (3, 64, 64)),  # pooled by attention
    Backbone("naflexvit_base_patch16_radio_v3", SMALL | {"init_values": 0.5}, (3, 64, 64)),
    Backbone("samvit_base_patch16_224", VIT | SMALL | SMALL_SAM),
    Backbone("samvit_base_patch16", VIT | SMALL | {"neck_chans": 16, "use_rel_pos": False, "use_rope": True}),
    Backbone("hiera_tiny_224", SMALL_HIERA | {"img_size": 64}, (3, 64, 64)),
    Backbone("hiera_base_abswin_256", SMALL_HIERA | {"img_size": 64}, (3, 64, 64)),  # positions of windows
    Backbone("sam2_hiera_tiny", SMALL_HIERA | {"window_spec": (4, 2, 4, 2)}, (3, 64, 64)),
    Backbone("vit_relpos_medium_patch16_cls_224", VIT | SMALL),  # positions by an MLP, beside a class token
    Backbone("vit_relpos_small_patch16_224", VIT | SMALL | {"rel_pos_type": "bias", "qkv_bias": True, "qk_norm": True}),
    Backbone("vit_srelpos_small_patch16_224", VIT | SMALL),  # positions that all blocks share
    Backbone("vit_srelpos_small_patch16_224", VIT | SMALL | {"rel_pos_type": "bias"}, label="table"),
    Backbone("beit_base_patch16_224", VIT | SMALL),  # biases of relative positions
    Backbone(
        "beit_base_patch16_224",
        VIT | SMALL | {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
        label="shared",
    ),
    Backbone(
        "beitv2_base_patch16_224",
        VIT | SMALL | {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "global_pool": "token"},
        label="token",
    ),
    Backbone("twins_pcpvt_small", SMALL_TWINS | {"mlp_ratios": (2, 2, 2, 2)}),
    Backbone(
        "twins_svt_small", SMALL_TWINS | {"wss": (3, 3, 4, 2), "depths": [2, 1, 1, 1]}
    ),  # maps padded to whole windows
    Backbone("cait_xxs24_224", VIT | SMALL | {"depth_token_only": 1}),  # talking heads, class attention
    Backbone("xcit_nano_12_p16_224", VIT | SMALL | {"cls_attn_layers": 1}),  # attention among channels
    Backbone("crossvit_9_240", SMALL_CROSSVIT),
    Backbone("crossvit_15_dagger_240", SMALL_CROSSVIT),  # patches by several convolutions
    Backbone("volo_d1_224", SMALL_VOLO),  # outlook attention, which stays whole, and two classifiers
    Backbone("test_maxvit", COAT | {"block_type": ("PM", "M", "C", "T"), "depths": (1, 1, 1, 2)}),
    Backbone("test_coatnet", COAT | CONVNEXT | {"block_type": ("M", "T", "C", "T"), "depths": (1, 1, 1, 1)}),
    Backbone("test_maxvit", COAT | TENSORFLOW | {"block_type": ("M", "M", "C", "M")}, label="tf"),
    Backbone("qwen3_vit_88m_enc", SMALL_TOWER, (3, 64, 64)),
    Backbone("qwen3_vit_88m_merge", SMALL_TOWER, (3, 64, 64)),
    Backbone("qwen3_vit_88m", SMALL_TOWER, (3, 64, 64)),
    Backbone("deepseek_vit_412m_enc", SMALL_TOWER | {"patch_size": 8}, (3, 64, 64)),
    Backbone("deepseek_vit_412m_align", SMALL_TOWER | {"patch_size": 8}, (3, 64, 64)),
    Backbone("deepseek_vit_412m", SMALL_TOWER | {"patch_size": 8}, (3, 64, 64)),
    Backbone("swin_tiny_patch4_window7_224", {"depths": (1, 2, 2, 1), "img_size": 112, "embed_dim": 48}),
    Backbone("swinv2_tiny_window8_256", {"depths": (1, 2, 2, 1), "img_size": 128, "embed_dim": 48}),
    Backbone("pvt_v2_b0", {"depths": (1, 1, 2, 1)}, (3, 64, 64)),
    Backbone("pvt_v2_b2_li", {"depths": (1, 1, 2, 1)}, (3, 64, 64)),  # linear attention
)
VIT_TINY = TIMM_BACKBONES[0]
DISTILLED = TIMM_BACKBONES[2]
CAIT = next(b for b in TIMM_BACKBONES if b.name.startswith("cait"))
SWIN, SWIN_V2, PVT = TIMM_BACKBONES[-4:-1]

SMALL_SWIN = {"embed_dims": 24, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4), "window_size": 4}
PLAIN = {"use_abs_pos_embed": True, "pretrain_img_size": 64, "patch_norm": False, "qkv_bias": False}
SMALL_PVT = {"embed_dims": 8, "num_layers": (1, 1, 2, 1)}
MIXED = {"use_abs_pos_embed": False, "use_conv_ffn": True, "norm_after_stage": True, "qkv_bias": False}  # of v2
MMDET_BACKBONES = (
    Backbone("SwinTransformer", SMALL_SWIN, (3, 86, 70), source="mmdet"),  # every stage is padded to whole windows
    Backbone("SwinTransformer", SMALL_SWIN | PLAIN, (3, 64, 64), "plain", source="mmdet"),
    Backbone("PyramidVisionTransformerV2", SMALL_PVT, (3, 86, 70), source="mmdet"),
    Backbone("PyramidVisionTransformerV2", SMALL_PVT | {"qkv_bias": False}, (3, 64, 64), "plain", source="mmdet"),
    Backbone("PyramidVisionTransformer", SMALL_PVT | {"pretrain_img_size": 64}, (3, 86, 70), source="mmdet"),
    Backbone("PyramidVisionTransformer", SMALL_PVT | MIXED, (3, 64, 64), "mixed", source="mmdet"),
)
MMDET_SWIN, MMDET_PVT = MMDET_BACKBONES[0], MMDET_BACKBONES[2]

SMALL_VITDET = SMALL | {"img_size": 64, "pretrain_img_size": 64, "window_size": 3, "window_block_indexes": (0,)}
VITDET = Backbone("ViT", SMALL_VITDET | {"use_rel_pos": True}, (3, 64, 64), source="vitdet")
VITDET_BACKBONES = (
    VITDET,
    Backbone(
        "ViT",
        SMALL_VITDET | {"depth": 3, "use_abs_pos": False, "qkv_bias": False},
        (3, 64, 64),
        "plain",
        source="vitdet",
    ),
)

SMALL_HF = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
SMALL_HF |= {"image_size": 32, "patch_size": 8}
SHARED_BIAS = {"use_shared_relative_position_bias": True, "use_relative_position_bias": False}
SMALL_HF_BEIT = SMALL_HF | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}
SMALL_HF_BEIT |= {"use_mask_token": True}
SMALL_HF_SWIN = {"image_size": 52, "patch_size": 4, "embed_dim": 24, "depths": [1, 2, 2, 1], "num_heads": [2, 2, 4, 4]}
SMALL_HF_SWIN |= {"window_size": 2, "mlp_ratio": 2, "use_absolute_embeddings": True}
# As dicts, which a checkpoint folder has, too. The maps of a Swin are those of its stages.
SMALL_HF_MAPS = SMALL_HF_SWIN | {"model_type": "swin"}
SMALL_HF_RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SMALL_HF_RESNET |= {"layer_type": "basic", "image_size": 64}
SMALL_DETR = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 6, "use_timm_backbone": False}
SMALL_DETR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "backbone": None}
SMALL_DETR |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "num_labels": 5}
SMALL_MASK2FORMER = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 4}
SMALL_MASK2FORMER |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_feedforward_dim": 40, "dim_feedforward": 48}
SMALL_MASK2FORMER |= {"num_queries": 6, "num_labels": 5}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
TRANSFORMERS_BACKBONES = tuple(
    Backbone(name, kwargs, label="".join(label), source="transformers")
    for name, kwargs, *label in (
        ("ViTModel", SMALL_HF),
        ("ViTForImageClassification", SMALL_HF),
        ("DeiTModel", SMALL_HF),
        ("DeiTForImageClassification", SMALL_HF),
        ("DeiTForImageClassificationWithTeacher", SMALL_HF),
        ("Dinov2Model", SMALL_HF | {"mlp_ratio": 2}),
        ("Dinov2Model", SMALL_HF | {"use_swiglu_ffn": True}, "swiglu"),
        ("Dinov2ForImageClassification", SMALL_HF | {"mlp_ratio": 2}),
        ("Dinov2ForImageClassification", SMALL_HF | {"use_swiglu_ffn": True}, "swiglu"),
        ("DINOv3ViTModel", SMALL_HF | {"num_register_tokens": 2, "use_gated_mlp": True, "key_bias": True}),
        ("CLIPVisionModel", SMALL_HF),
        ("SiglipVisionModel", SMALL_HF),
        ("SwinModel", SMALL_HF_SWIN),
        ("SwinForImageClassification", SMALL_HF_SWIN),
        ("SwinBackbone", SMALL_HF_SWIN | {"out_features": ["stage2", "stage4"]}),
        ("BeitModel", SMALL_HF_BEIT),
        ("BeitModel", SMALL_HF_BEIT | {"use_mean_pooling": False}, "token"),
        ("BeitForImageClassification", SMALL_HF_BEIT),
        ("BeitForImageClassification", SMALL_HF_BEIT | {"use_shared_relative_position_bias": True}, "both"),
        ("BeitForImageClassification", SMALL_HF_BEIT | SHARED_BIAS, "shared"),
        ("BeitModel", SMALL_HF_BEIT | SHARED_BIAS, "shared"),
        ("BeitForImageClassification", SMALL_HF_BEIT | {"use_mean_pooling": False}, "token"),
        ("DetrForObjectDetection", SMALL_DETR | {"backbone_config": SMALL_HF_MAPS | {"out_features": ["stage4"]}}),
        ("DetrForObjectDetection", SMALL_DETR | {"backbone_config": SMALL_HF_RESNET}, "resnet"),
        ("Mask2FormerForUniversalSegmentation", SMALL_MASK2FORMER | {"backbone_config": SMALL_HF_MAPS | STAGES}),
    )
    if importlib.util.find_spec("transformers")  # the extra; the group dev has it
)
BACKBONES = TIMM_BACKBONES + MMDET_BACKBONES + VITDET_BACKBONES + TRANSFORMERS_BACKBONES
# One of each family is tried by everyone; the others are slow, by their number (pytest -m slow).
EVERY_DAY = frozenset(
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_base_patch16_siglip_224",
        "vit_tiny_patch16_224-swiglu",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3_qkvb",
        "vit_relpos_small_patch16_224",
        "beit_base_patch16_224",
        "cait_xxs24_224",
        "xcit_nano_12_p16_224",
        "twins_svt_small",
        "crossvit_9_240",
        "test_maxvit",
        "naflexvit_base_patch16_parfac_gap",
        "samvit_base_patch16_224",
        "hiera_tiny_224",
        "mvitv2_tiny",
        "pit_ti_224",
        "davit_small",
        "swinv2_cr_tiny_ns_224",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "pvt_v2_b0",
        "mmdet-SwinTransformer",
        "mmdet-PyramidVisionTransformerV2",
        "mmdet-PyramidVisionTransformer",
        "vitdet-ViT",
        "transformers-ViTForImageClassification",
    ]
)
