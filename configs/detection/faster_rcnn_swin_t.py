# sidt detect train configs/detection/faster_rcnn_swin_t.py --data-root COCO
# sidt detect search runs/faster_rcnn_swin_t --budget.params 0.6
# sidt detect finetune runs/faster_rcnn_swin_t && sidt detect evaluate runs/faster_rcnn_swin_t
# Result: not run: needs COCO's 118,000 training images and a GPU.
_base_ = [
    "mmdet::_base_/models/faster-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.2,
        convert_weights=True,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
            "swin_tiny_patch4_window7_224.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={"relative_position_bias_table": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}
    ),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)

sidt = dict(budget=dict(params=0.6), holdout=1000, score_images=512, finetune={"optim_wrapper.optimizer.lr": 5e-5})
