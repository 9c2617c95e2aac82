"""A detector whose backbone's search space does not come with SiDT takes the file along, dense and sliced."""

import re

import pytest
import torch
from backbones import random_plan
from small_detector import random_detector, small_config

from sidt.detection.detectors.checkpoints import load_detector, save_detector
from sidt.detection.detectors.configs import read_config
from sidt.detection.detectors.space import detector_space, run_backbone
from sidt.detection.runs.folder import open_run
from sidt.space.finding import SPACES, families, search_path, use_spaces
from sidt.surgery.slicing import slice_model

SIZE = (3, 64, 64)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The file of MMDetection's Swin with another name for its MLPs."""
    monkeypatch.setenv(SPACES, "")
    (swin,) = (family.file for family in families() if family.file.stem == "mmdet_swin")
    file = tmp_path / "mine.yaml"
    file.write_text(re.sub(r"\bhidden\b", "inside", swin.read_text()))
    return file


def test_folders_of_detectors(mine, tmp_path, monkeypatch):
    config = read_config(small_config(tmp_path))
    use_spaces(mine)
    dense = random_detector(config)
    save_detector(dense, config, tmp_path / "dense", ["digit"])
    space = detector_space(dense, config.model, SIZE)
    small = slice_model(dense, random_plan(space, 0, ("mlp", "heads")))
    save_detector(small, config, tmp_path / "sliced", ["digit"])
    monkeypatch.setenv(SPACES, "")
    mine.unlink()  # the folders are all that is needed
    image = torch.randn(1, *SIZE)
    for name, detector in (("dense", dense), ("sliced", small)):
        loaded, loaded_config = load_detector(tmp_path / name)
        for a, b in zip(run_backbone(loaded, image), run_backbone(detector, image), strict=True):
            torch.testing.assert_close(a, b)
        dimensions = detector_space(loaded, loaded_config.model, SIZE).dimensions
        assert "inside.0.0" in dimensions and "hidden.0.0" not in dimensions


def test_the_section_of_a_config(mine, tmp_path, refused):
    open_run(small_config(tmp_path, f"\nsidt = dict(spaces=[{str(mine)!r}])\n"), tmp_path / "run")
    assert search_path() == (mine,)
    with refused("nowhere.yaml"):
        open_run(small_config(tmp_path, "\nsidt = dict(spaces=['nowhere.yaml'])\n"), tmp_path / "run")
