"""timm's small backbones in MMDetection, images for them, and what their last map must be."""

import torch
from backbones import PVT, SWIN, SWIN_V2, TIMM_BACKBONES, VIT_TINY, Backbone, shake
from torch import nn

from sidt.detection.detectors.backbones import TimmBackbone

FOUR = (VIT_TINY, SWIN, SWIN_V2, PVT)
BEIT_3 = TIMM_BACKBONES[12]  # its final norm stands behind the pool


def built(backbone: Backbone, **kwargs) -> TimmBackbone:
    return shake(TimmBackbone(backbone.name, args=backbone.kwargs, **kwargs)).eval()


def images(height=64, width=64):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(7))


def check_last_map(module, model, batch):
    with torch.no_grad():
        features, last = model.forward_features(batch), module(batch)[-1]
        if features.ndim == 3:  # tokens
            prefix = getattr(model, "num_prefix_tokens", 0)  # which Twins does not state
            features = getattr(model, "fc_norm", nn.Identity())(features)[:, prefix:].mT.reshape(last.shape)
        elif features.shape != last.shape:
            features = features.permute(0, 3, 1, 2)
    torch.testing.assert_close(last, features, rtol=1e-4, atol=1e-4)
