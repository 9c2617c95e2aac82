# sidt detect search configs/detection/retinanet_pvt_v2_b0.py --checkpoint FILE --data-root COCO --budget.params 0.6
# sidt detect finetune runs/retinanet_pvt_v2_b0 && sidt detect evaluate runs/retinanet_pvt_v2_b0
# FILE: MMDetection's published checkpoint of this config (37.1 box AP).
# Result: not run: needs COCO's 118,000 training images and a GPU.
_base_ = "mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py"

sidt = dict(budget=dict(params=0.6), holdout=1000, score_images=512, finetune={"optim_wrapper.optimizer.lr": 5e-5})
