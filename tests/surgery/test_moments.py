"""Moments on disk: what was saved comes back, and only for whoever measured the same."""

import pytest
import torch
from backbones import BACKBONES
from torch.testing import assert_close

from sidt.surgery.moments import load_moments, measure_moments
from sidt.surgery.symmetric import gram, strips_of, whole

VIT = BACKBONES[0]


@pytest.fixture
def moments():
    return measure_moments(VIT.build(), [(VIT.images(4), None)])


def test_saved_moments_come_back(moments, tmp_path):
    moments.save(tmp_path / "moments.safetensors", {"images": 4})
    again = load_moments(tmp_path / "moments.safetensors", moments.space, {"images": 4})
    assert again is not None and again.inputs.keys() == moments.inputs.keys()
    for rows in moments.inputs:
        found, moment = again.read_by(*rows), moments.read_by(*rows)
        assert torch.equal(found.triu(), moment.triu())
        assert_close(found, moment, rtol=1e-5, atol=1e-6 * float(moment.abs().max()))
    entries = sum(moments.read_by(*rows).numel() for rows in moments.inputs)
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


@pytest.mark.parametrize("size", [1, 1023, 1024, 1027])
def test_strips_are_the_matrix(size):
    x = torch.randn(3, size, dtype=torch.float64)
    strips = gram(x)
    assert_close(whole(strips), x.T @ x)
    assert all(map(torch.equal, strips_of(whole(strips)), strips))
    if size >= 1024:
        assert sum(strip.numel() for strip in strips) < 0.57 * size**2
