"""The simple feature pyramid: its levels, its parameters, and what follows the backbone's width."""

import torch

from sidt.detection.detectors.pyramid import SimpleFeaturePyramid


def test_the_pyramid_has_the_parameters_of_vitdet():
    """Counted by hand for ViT-B: 768 channels, 256 out, as in the paper's implementation."""
    neck = SimpleFeaturePyramid(768, 256, 384, num_outs=5)
    norm, three = 2 * 256, 256 * 256 * 9
    up = 768 * 384 * 4 + 384
    assert [sum(p.numel() for p in level.parameters()) for level in neck.levels] == [
        up + 2 * 384 + 384 * 192 * 4 + 192 + 192 * 256 + norm + three + norm,
        up + 384 * 256 + norm + three + norm,
        768 * 256 + norm + three + norm,
        768 * 256 + norm + three + norm,
    ]


def test_the_pyramid_has_a_map_for_every_scale():
    neck = SimpleFeaturePyramid([24], out_channels=8, hidden_channels=12, num_outs=6)
    maps = neck((torch.randn(1, 24, 5, 7),))
    sizes = [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2), (1, 1)]
    assert [tuple(m.shape) for m in maps] == [(1, 8, *size) for size in sizes]
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in neck.parameters())
    two = SimpleFeaturePyramid(24, 8, 12, scales=(2, 0.5))
    assert [tuple(m.shape[2:]) for m in two(torch.randn(1, 24, 4, 4))] == [(8, 8), (2, 2)]


def test_only_its_input_follows_the_backbones_width():
    """Every tensor of a neck for a narrower backbone is the same, or shorter along one axis, the width."""
    wide, narrow = SimpleFeaturePyramid(24, 8, 12), SimpleFeaturePyramid(18, 8, 12)
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        different = [(x, y) for x, y in zip(a.shape, b.shape, strict=True) if x != y]
        assert different in ([], [(24, 18)]), name


def test_pyramids_that_cannot_be_built(refused):
    with refused("scales=[3, 1]", "0.5"):
        SimpleFeaturePyramid(24, 8, 12, scales=(3, 1))
    with refused("scales=[1, 2]"):
        SimpleFeaturePyramid(24, 8, 12, scales=(1, 2))
    with refused("num_outs=2", "4 scales"):
        SimpleFeaturePyramid(24, 8, 12, num_outs=2)
