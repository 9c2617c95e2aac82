# sidt detect search configs/detection/mask_rcnn_swin_t.py --checkpoint FILE --data-root COCO --budget.params 0.6
# sidt detect finetune runs/mask_rcnn_swin_t && sidt detect evaluate runs/mask_rcnn_swin_t
# FILE: MMDetection's published checkpoint of this config (42.7 box AP, 39.3 mask AP); COCO: a folder with annotations/,
# train2017/ and val2017/.
# Result: not run on COCO: needs its 118,000 training images and a GPU.
# On 159 of its photographs: benchmarks/results/coco_mini.md
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

sidt = dict(
    budget=dict(params=0.6),
    holdout=1000,
    score_images=512,
    trials=20,
    finetune={"optim_wrapper.optimizer.lr": 5e-5},
)
