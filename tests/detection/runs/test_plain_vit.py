"""A plain ViT behind a pyramid that pools its map, whose width is rotated for one layer more."""

import pytest
import torch
from small_detector import CONFIGS, SEARCH, opened, random_detector, small_digits

from sidt.detection.detectors.checkpoints import load_detector
from sidt.detection.detectors.configs import read_config
from sidt.detection.runs import pipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_digits(tmp_path_factory.mktemp("data"))


PLAIN = """
_base_ = "{base}"
model = dict(
    backbone=dict(args=dict(img_size=64, embed_dim=32, depth=2)),
    neck=dict(in_channels=32, out_channels=16, hidden_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, norm_cfg=dict(num_groups=4)),
)
"""


def test_a_plain_vit_is_searched_behind_one_more_layer(data, tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(PLAIN.format(base=CONFIGS / "digits_vit.py") + SEARCH)
    dense = random_detector(read_config(path))
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    run = opened(path, data, tmp_path / "run", objective="loss", trials=2, budget={"params": 0.3})
    pipeline.take_checkpoint(run, tmp_path / "dense.pth")
    pipeline.search(run, print)
    before, after = (load_detector(run.folder / name) for name in ("dense", "sliced"))
    assert "pooled_channels" not in before[1].model.neck and not hasattr(before[0], "sidt_rotated")
    neck = after[1].model.neck
    assert neck.pooled_channels == 32 > neck.in_channels >= 2 and after[0].sidt_rotated == ("embed",)
    kept = sum(p.numel() for p in after[0].backbone.parameters())
    assert kept <= 0.3 * sum(p.numel() for p in before[0].backbone.parameters())
    counted = opened(path, data, tmp_path / "run", on="detector")  # where that layer would be part of the budget
    pipeline.search(counted, print)
    assert "pooled_channels" not in load_detector(run.folder / "sliced")[1].model.neck
