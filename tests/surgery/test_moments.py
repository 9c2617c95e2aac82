"""Moments on disk: what was saved comes back, and only for whoever measured the same."""

import pytest
import torch
from backbones import BACKBONES
from torch.testing import assert_close

from sidt.surgery.moments import load_moments, measure_moments

VIT = BACKBONES[0]


@pytest.fixture
def moments():
    return measure_moments(VIT.build(), [(VIT.images(4), None)])


def test_saved_moments_come_back(moments, tmp_path):
    moments.save(tmp_path / "moments.safetensors", {"images": 4})
    again = load_moments(tmp_path / "moments.safetensors", moments.space, {"images": 4})
    assert again is not None and again.inputs.keys() == moments.inputs.keys()
    for rows, moment in moments.inputs.items():
        assert torch.equal(again.inputs[rows].triu(), moment.triu())
        assert_close(again.inputs[rows], moment, rtol=1e-5, atol=1e-6 * float(moment.abs().max()))
    entries = sum(moment.numel() for moment in moments.inputs.values())
    assert (tmp_path / "moments.safetensors").stat().st_size < 8 * entries * 0.6, "half of a symmetric matrix is enough"


def test_moments_of_something_else_are_not_taken(moments, tmp_path):
    path = tmp_path / "moments.safetensors"
    assert load_moments(path, moments.space, {"images": 4}) is None
    moments.save(path, {"images": 4})
    assert load_moments(path, moments.space, {"images": 5}) is None


def test_a_damaged_file_is_named(moments, tmp_path, refused):
    path = tmp_path / "moments.safetensors"
    moments.save(path, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with refused("moments.safetensors", "delete it"):
        load_moments(path, moments.space, 1)
