"""The neck of ViTDet's project: its inner channels are parts of those of the one map."""

from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import nn


@MODELS.register_module()
class SimpleFPN(BaseModule):
    def __init__(self, backbone_channel, in_channels, out_channels, num_outs, norm_cfg=None, init_cfg=None):
        super().__init__(init_cfg)
        channels, half = backbone_channel, backbone_channel // 2
        self.num_outs = num_outs
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, 2), nn.GELU(), nn.ConvTranspose2d(half, half // 2, 2, 2)
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(channels, half, 2, 2))
        self.fpn3 = nn.Sequential(nn.Identity())
        self.fpn4 = nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2))
        self.lateral_convs = nn.ModuleList(ConvModule(c, out_channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(ConvModule(out_channels, out_channels, 3, padding=1) for _ in in_channels)

    def forward(self, features):
        maps = [way(features) for way in (self.fpn1, self.fpn2, self.fpn3, self.fpn4)]
        outs = [b(a(m)) for a, b, m in zip(self.lateral_convs, self.fpn_convs, maps, strict=True)]
        return tuple(outs[: self.num_outs])
