"""A detector on digits of a few pixels: it trains in a second."""

from pathlib import Path

import torch
from mmengine.logging.history_buffer import HistoryBuffer

from sidt.detection.data.digits import write_digits
from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.runs.folder import open_run

CONFIGS = Path(__file__).parents[1] / "configs" / "detection"
SMALL = """
_base_ = "{base}"
model = dict(
    backbone=dict(embed_dims=16, depths=(1, 2, 1), num_heads=(2, 2, 4), window_size=4),
    neck=dict(in_channels=[32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, norm_cfg=dict(num_groups=4)),
)
train_cfg = dict(max_epochs=1, val_interval=10)
"""
SEARCH = """
param_scheduler = []
sidt = dict(
    budget=dict(params=0.6),
    holdout=4,
    score_images=8,
    trials=2,
    finetune={"optim_wrapper.optimizer.lr": 1e-4},
)
"""


def small_digits(folder):
    """The images, where a config of the same folder looks for them."""
    write_digits(folder / "digits", train=24, val=6, size=64)
    return folder / "digits"


def small_config(folder, rest=""):
    """A config file that ends with ``rest``."""
    path = folder / "small.py"
    path.write_text(SMALL.format(base=CONFIGS / "digits_swin.py") + rest)
    return path


def opened(config, data, folder, **settings):
    return open_run(config, folder, None, settings, data_root=data)


def random_detector(config):
    """A detector whose parameters are all off their start, and finds something in every image."""
    torch.manual_seed(0)
    detector = build_detector(config)
    detector.init_weights()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for head in detector.bbox_head.modules():
            if getattr(head, "out_channels", None) == 10:
                head.bias.fill_(-1.0)
    return detector.eval()


def write_checkpoint(folder, config):
    """The detector as MMEngine writes it: with what its logger keeps, which torch does not know."""
    path = folder / "epoch_1.pth"
    detector = random_detector(read_config(config))
    message_hub = {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}}
    torch.save({"meta": {"epoch": 1}, "state_dict": detector.state_dict(), "message_hub": message_hub}, path)
    return path
