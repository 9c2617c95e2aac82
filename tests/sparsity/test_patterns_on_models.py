"""Packed kernels in the order of their filters, and convolutions that run on them."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sidt.sparsity.config import LayersConfig, structures_of
from sidt.sparsity.convolution import PatternConv, pattern_convolutions, time_convolutions
from sidt.sparsity.holding import project
from sidt.sparsity.packing import pack, unpack
from sidt.sparsity.patterns import Kernels, Largest
from sidt.sparsity.reordering import filter_order, order_bits, reorder
from sidt.sparsity.structures import Structure
from sidt.sparsity.tiles import Tiles
from sidt.sparsity.values import Floats, Levels, Ternary

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 7))
KEEP = st.sampled_from([0.2, 0.5, 1.0])


def structure_of(keep, values=None, patterns=8):
    return Structure((Kernels(patterns), Largest(Tiles(1, 1), keep)), values or Floats())


@given(SIZES, KEEP, st.sampled_from([Floats(), Levels(8), Ternary(0.05)]), st.integers(0, 99))
def test_packed_filters_come_back_bit_for_bit(size, keep, values, seed):
    weight = torch.randn(*size, 3, 3, generator=torch.Generator().manual_seed(seed))
    structure = structure_of(keep, values)
    weight = structure.project(weight)
    parts = pack(weight, structure)
    assert torch.equal(unpack(parts, structure, tuple(weight.shape)), weight)
    assert 8 * (len(parts["order"]) - 1) < size[0] * order_bits(size[0]) <= 8 * len(parts["order"])
    filters = reorder(weight, structure.stored(weight))
    assert torch.equal(filters.restored(), weight)
    assert len(filters.values) == structure.stored(weight).sum() == filters.counts().sum()


@given(SIZES, KEEP, st.integers(0, 99))
def test_filters_stand_by_length_and_kernels_by_pattern(size, keep, seed):
    weight = structure_of(keep).project(torch.randn(*size, 3, 3, generator=torch.Generator().manual_seed(seed)))
    kept = structure_of(keep).stored(weight)
    order = filter_order(kept)
    assert torch.equal(order.sort().values, torch.arange(size[0]))
    lengths = kept.flatten(2).any(2).sum(1)[order]
    assert (lengths.diff() <= 0).all()
    filters = reorder(weight, kept)
    assert torch.equal(filters.starts.diff(), lengths)
    for begin, end in zip(filters.starts[:-1], filters.starts[1:], strict=True):
        assert (filters.which[begin:end].diff() >= 0).all()
    assert torch.equal(filter_order(kept[order]), torch.arange(size[0]))  # it is in order now


def test_filters_of_the_same_patterns_stand_side_by_side():
    kept = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    for row, column in enumerate((0, 2, 0, 2)):
        kept[row, :, 1, 1] = kept[row, :, 0, column] = True
    kinds = [int(kept[i, 0, 0, 0]) for i in filter_order(kept)]
    assert kinds in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_a_wrong_order_is_refused(refused):
    structure = structure_of(0.5)
    weight = structure.project(torch.randn(4, 3, 3, 3))
    parts = pack(weight, structure)
    with refused("order of 4 filters", "[4, 3, 3, 3]"):
        unpack(parts | {"order": torch.zeros_like(parts["order"])}, structure, (4, 3, 3, 3))
    for shape in ((4, -3, 3, 3), (4, 3, 3, 2**60), (4, 3.0, 3, 3)):
        with refused("do not make a weight"):
            unpack(parts, structure, shape)


@given(
    SIZES,
    st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    st.sampled_from([(0, 0), (1, 1), (2, 0)]),
    st.sampled_from([(1, 1), (2, 1)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_convolution_on_packed_kernels_is_the_dense_one(size, stride, padding, dilation, bias, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(size[1], size[0], 3, stride=stride, padding=padding, dilation=dilation, bias=bias)
    structure = structure_of(0.4)
    project(conv, {"weight": structure})
    twin = PatternConv(conv, reorder(conv.weight, structure.stored(conv.weight)))
    images = torch.randn(2, size[1], 27, 23)  # more positions than are summed at once
    with torch.inference_mode():
        assert_close(twin(images), conv(images), atol=1e-5, rtol=0)


def test_what_cannot_run_on_packed_kernels_says_so(refused):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    structures = {"0.weight": structure_of(1.0)}
    project(model, structures)
    with refused("groups=4", "leave it dense"):
        PatternConv(model[0], reorder(model[0].weight, model[0].weight != 0))
    with refused("no convolution without groups", "leave engine out"):
        pattern_convolutions(model, structures)


SMALL = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "size", "stem"),
    [
        ("pvt_v2_b0", {}, "stages.*.downsample.proj.weight"),
        ("xcit_nano_12_p8_224", {"img_size": 64}, "patch_embed.proj.*.0.weight"),
        ("vit_base_resnet26d_224", SMALL, "patch_embed.backbone.conv1.?.weight"),
    ],
)
def test_the_stems_of_pyramids_and_hybrids_run_on_patterns(name, size, stem):
    model = timm.create_model(name, num_classes=10, **size).eval()
    layers = LayersConfig(layers=stem, structure=structure_of(0.5))
    structures = structures_of(model, [layers], None)
    assert len(structures) == 3
    project(model, structures)
    twins, images = pattern_convolutions(model, structures), torch.randn(1, 3, 64, 64)
    times = time_convolutions(model, structures, lambda m: m(images))
    assert set(times) == {"dense convolutions", "packed convolutions"} and min(times.values()) > 0
    with torch.inference_mode():
        wanted = model(images)
        for name, twin in twins.items():
            model.set_submodule(name, twin)
        assert_close(model(images), wanted, atol=1e-5, rtol=1e-4)


def test_convolutions_that_do_more_than_convolve_are_left_alone(refused):
    class Centred(nn.Conv2d):
        def forward(self, maps):
            return nn.functional.conv2d(maps, self.weight - self.weight.mean((1, 2, 3), keepdim=True))

    model = nn.Sequential(Centred(3, 4, 3), nn.Conv2d(4, 4, 3))
    structures = {f"{i}.weight": structure_of(0.5) for i in range(2)}
    project(model, structures)
    assert list(pattern_convolutions(model, structures)) == ["1"]
    with refused("no convolution"):
        pattern_convolutions(model, {"0.weight": structure_of(0.5)})
