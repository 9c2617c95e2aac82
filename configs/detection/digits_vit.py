# sidt detect train configs/detection/digits_vit.py && sidt detect search runs/digits_vit
# sidt detect finetune runs/digits_vit && sidt detect evaluate runs/digits_vit
# The images of digits_swin.py, which `sidt detect demo` writes, for a plain ViT of timm with a simple pyramid.
# Result: AP 61.1 +- 0.9 with 40 % fewer MACs in the backbone, 61.2 +- 1.0 dense and trained as long;
# benchmarks/results/detection_vit.md.
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
