# sidt detect train configs/detection/mask_rcnn_vit_s.py --data-root COCO
# sidt detect search runs/mask_rcnn_vit_s --budget.params 0.6
# sidt detect finetune runs/mask_rcnn_vit_s && sidt detect evaluate runs/mask_rcnn_vit_s
# A plain ViT from timm with the simple feature pyramid of ViTDet (global attention in every block).
# Result: not run: needs COCO's 118,000 training images, a GPU, and timm's weights from the hub.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["sidt.detection.models"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="TimmBackbone", model="deit_small_patch16_224.fb_in1k", pretrained=True),
    neck=dict(
        _delete_=True, type="SimpleFeaturePyramid", in_channels=384, hidden_channels=192, out_channels=256, num_outs=5
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={"pos_embed": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
)

sidt = dict(budget=dict(params=0.6), holdout=1000, score_images=512, finetune={"optim_wrapper.optimizer.lr": 5e-5})
