# sidt detect train configs/detection/bccd_swin.py
# A small Swin of MMDetection with four stages, ATSS, from random weights, on the blood cells of BCCD (MIT; 292
# micrographs to train on and 72 to test on, in COCO's format below data/bccd; docs/detection.md says where they are).
# Results: AP 56.9, AP50 90.1 dense (three seeds), and with no training 56.8 at 10 % of the backbone's parameters and
# 56.8 at 10 % of its MACs; fine-tuned 57.0 at 10 % of the parameters, dense trained on as long 57.0
# (benchmarks/results/bccd.md).
_base_ = "mmdet::_base_/default_runtime.py"
custom_imports = dict(imports=["sidt.detection.models"], allow_failed_imports=False)

data_root = "data/bccd/"
classes = ("RBC", "WBC", "Platelets")
image_size = (320, 240)
epochs = 72

model = dict(
    type="ATSS",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="SwinTransformer",
        embed_dims=48,
        depths=(2, 2, 2, 2),
        num_heads=(2, 4, 8, 16),
        window_size=5,
        drop_path_rate=0.1,
        out_indices=(1, 2, 3),
    ),
    neck=dict(type="FPN", in_channels=[96, 192, 384], out_channels=64, num_outs=3),
    bbox_head=dict(
        type="ATSSHead",
        num_classes=3,
        in_channels=64,
        feat_channels=64,
        stacked_convs=1,
        norm_cfg=dict(type="GN", num_groups=16, requires_grad=True),
        # Platelets are of 20 pixels, red cells of 50, white ones of 100.
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=3, scales_per_octave=1, strides=[8, 16, 32]
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
    ),
    train_cfg=dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.6), max_per_img=100
    ),
)

# A slide has no side that is up.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=image_size, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PhotoMetricDistortion", hue_delta=9),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_test.json",
        data_prefix=dict(img="test/"),
        metainfo=dict(classes=classes),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_test.json", metric="bbox")
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=12)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=7e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
warm_up = dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True)
cosine = dict(type="CosineAnnealingLR", eta_min=0.0, begin=1, convert_to_iter_based=True)
param_scheduler = [warm_up, dict(**cosine, end=epochs, T_max=epochs - 1)]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=1, max_keep_ckpts=1))
randomness = dict(seed=0)

sidt = dict(
    budget=dict(params=0.1),
    trials=20,
    finetune={
        "train_cfg.max_epochs": 12,
        "train_cfg.val_interval": 12,
        "optim_wrapper.optimizer.lr": 3e-4,
        "param_scheduler": [warm_up, dict(**cosine, end=12, T_max=11)],
    },
)
