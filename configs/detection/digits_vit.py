# sidt detect train configs/detection/digits_vit.py
# The images of digits_swin.py, which `sidt detect demo` writes, for a plain ViT of timm with a simple pyramid.
# Result: not run to the end; 4 of its 10 epochs gave AP 44.6 on a first version of the images.
_base_ = "./digits_swin.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmBackbone",
        model="vit_tiny_patch16_224",
        args=dict(img_size=96, patch_size=8, embed_dim=128, depth=4, num_heads=4),
    ),
    neck=dict(
        _delete_=True,
        type="SimpleFeaturePyramid",
        in_channels=128,
        out_channels=64,
        hidden_channels=64,
        scales=(1, 0.5),
    ),
)
