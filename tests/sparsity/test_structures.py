"""Structures: projections that are nearest and idempotent, and a packed form that is bit for bit the weight."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch.testing import assert_close

from sidt.sparsity.packing import pack, packed, read_packed, unpack
from sidt.sparsity.patterns import Kernels, Largest, OfEvery, all_patterns, as_bits, from_bits
from sidt.sparsity.structures import Structure
from sidt.sparsity.tiles import Tiles
from sidt.sparsity.values import Floats, Levels, Ternary

KINDS = TypeAdapter(Structure)
MATRICES = st.sampled_from(
    [
        (),
        (Largest(Tiles(1, 4), 0.5),),
        (Largest(Tiles(3, 2), 0.4),),
        (Largest(Tiles(None, 1), 0.3),),
        (Largest(Tiles(1, None), 0.7),),
        (OfEvery(2, 4),),
        (OfEvery(1, 3),),
        (Largest(Tiles(4, 1, True), 0.6), Largest(Tiles(1, 5, True), 0.6)),
        (Largest(Tiles(1, 4), 0.8), OfEvery(2, 4)),
    ]
)
CONVOLUTIONS = st.sampled_from(
    [
        (Kernels(8, 0.5),),
        (Kernels(8),),
        (Kernels(3, 0.7),),
        (Kernels(8), Largest(Tiles(1, 1), 0.3)),
        (Largest(Tiles(2, 2), 0.5),),
    ]
)
VALUES = st.sampled_from([Floats(), Ternary(0.05), Ternary(0.5), Levels(8), Levels(4, "weight"), Levels(2)])


@st.composite
def cases(draw):
    """A weight and a structure for it."""
    seed, values = draw(st.integers(0, 2**16)), draw(VALUES)
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        return torch.randn(6, 12, generator=generator), Structure(draw(MATRICES), values)
    return torch.randn(4, 6, 3, 3, generator=generator), Structure(draw(CONVOLUTIONS), values)


@given(cases())
def test_a_projection_is_idempotent_and_packs_bit_for_bit(case):
    weight, structure = case
    structure.check(weight, "w")
    there = structure.project(weight)
    if not (weight.ndim == 4 and structure.values in (Ternary(0.5), Levels(2))):  # few entries say no pattern
        assert torch.equal(structure.project(there), there)
    parts = pack(there, structure)
    assert torch.equal(unpack(parts, structure, tuple(weight.shape)).view(torch.int32), there.view(torch.int32))
    bits = structure.bits(there)
    stored = {name: 8 * part.numel() * part.element_size() for name, part in parts.items()}
    assert bits.scales == stored["scales"]
    assert 0 <= stored["codes"] - bits.values < 8
    index = [size for name, size in stored.items() if name.startswith(("index", "order"))]
    assert 0 <= sum(index) - bits.index < 8 * max(len(index), 1)
    assert KINDS.validate_json(KINDS.dump_json(structure)) == structure


@given(cases())
def test_what_a_structure_rounds_to_is_what_it_stores(case):
    weight, structure = case
    there = structure.project(weight)
    assert not there[~structure.mask(weight)].any()
    assert not there[~structure.stored(there)].any()


@given(st.integers(0, 2**16), st.sampled_from([(2, 2, 0.5), (1, 2, 0.25), (2, 1, 0.7), (None, 1, 0.5)]))
def test_the_largest_tiles_are_the_nearest(seed, tiles):
    """By brute force over every choice of as many tiles."""
    rows, columns, keep = tiles
    weight, grid = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)), Tiles(rows, columns)
    norms = grid.norms(weight)
    count = int(keep * norms.numel())
    distances = []
    for chosen in combinations(range(norms.numel()), count):
        kept = torch.zeros(norms.numel()).index_fill(0, torch.tensor(chosen), 1.0).view_as(norms)
        distances.append(float((weight - weight * grid.spread(kept, weight)).norm()))
    found = Structure((Largest(grid, keep),)).project(weight)
    assert_close(float((weight - found).norm()), min(distances))


@given(st.integers(0, 2**16))
def test_the_largest_of_every_few_are_the_nearest(seed):
    weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    found = Structure((OfEvery(2, 4),)).project(weight)
    groups = weight.view(-1, 4).square()
    best = sum(min(float(group[list(gone)].sum()) for gone in combinations(range(4), 2)) for group in groups)
    assert_close(float((weight - found).square().sum()), best)
    assert ((found.view(-1, 4) != 0).sum(1) == 2).all()


@given(st.integers(0, 2**16))
def test_patterns_are_the_most_frequent_and_each_kernel_takes_its_best(seed):
    weight = torch.randn(12, 10, 3, 3, generator=torch.Generator().manual_seed(seed))
    flat = weight.flatten(2).reshape(-1, 9)
    natural = []
    for kernel in flat:
        others = sorted((i for i in range(9) if i != 4), key=lambda i: -abs(float(kernel[i])))[:3]
        natural.append(tuple(sorted([4, *others])))
    counts = sorted((natural.count(p) for p in set(natural)), reverse=True)
    found = Structure((Kernels(8),)).project(weight).flatten(2).reshape(-1, 9)
    used = [tuple(torch.nonzero(kernel)[:, 0].tolist()) for kernel in found]
    assert len(set(used)) <= 8 and all(len(p) == 4 and 4 in p for p in used)
    assert sorted((natural.count(p) for p in set(used)), reverse=True) <= counts[: len(set(used))]
    for kernel, mine in zip(flat, used, strict=True):
        assert (
            max(sum(float(kernel[i]) ** 2 for i in p) for p in set(used))
            <= sum(float(kernel[i]) ** 2 for i in mine) + 1e-6
        )


def test_there_are_56_patterns():
    table = all_patterns()
    assert len({tuple(row.tolist()) for row in table}) == 56
    assert (table.sum(1) == 4).all() and table[:, 4].all()


@given(cases())
def test_ternary_has_the_least_squares_scale_of_its_support(case):
    weight, structure = case
    ternary = Structure(structure.patterns, Ternary(0.05)).project(weight)
    values = ternary[ternary != 0].abs().unique()
    assert len(values) == 1
    support = ternary != 0
    signs = ternary[support].sign()
    best = (weight[support] * signs).sum() / support.sum()
    assert_close(values[0], best)
    kept = Structure(structure.patterns).project(weight).abs()
    assert torch.equal(support, kept > 0.05 * kept.max())


@given(st.integers(0, 2**16), st.integers(2, 8), st.sampled_from(["row", "weight"]))
def test_levels_are_the_nearest(seed, bits, per):
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    values = Levels(bits, per)
    found = Structure((), values).project(weight)
    top = 2 ** (bits - 1) - 1
    _, scales = values.encode(weight, torch.ones_like(weight, dtype=torch.bool))
    grid = torch.arange(-top, top + 1) * scales.view(-1, 1, 1).expand(4, 1, 1)
    assert_close((weight - found).abs(), (weight[..., None] - grid).abs().amin(-1), atol=1e-6, rtol=1e-5)
    largest = weight.abs().amax(1) if per == "row" else weight.abs().max().reshape(1)
    assert_close(scales, largest / top, rtol=2**-8, atol=0)


@given(st.lists(st.integers(0, 63), min_size=1, max_size=40))
def test_bits_and_back(numbers):
    assert from_bits(as_bits(torch.tensor(numbers), 6), 6).tolist() == numbers


def test_a_file_of_packed_tensors(tmp_path):
    torch.manual_seed(0)
    structures = {
        "a.weight": Structure((Largest(Tiles(1, 4), 0.5),), Ternary(0.05)),
        "b.weight": Structure((Kernels(8, 0.5),)),
    }
    state = {"a.weight": torch.randn(8, 16), "b.weight": torch.randn(4, 4, 3, 3), "a.bias": torch.randn(8)}
    state |= {name: s.project(state[name]) for name, s in structures.items()}
    path = tmp_path / "packed.safetensors"
    path.write_bytes(packed(state, structures))
    read, again = read_packed(path)
    assert again == structures and read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_mistakes_are_one_line(refused, tmp_path):
    weight = torch.randn(6, 10)
    with refused("blocks.0.fc1.weight", "10 inputs", "1 x 4", "5", "ragged"):
        Structure((Largest(Tiles(1, 4), 0.5),)).check(weight, "blocks.0.fc1.weight")
    with refused("fc1", "10 inputs", "4"):
        Structure((OfEvery(2, 4),)).check(weight, "fc1")
    with refused("fc1", "4:4", "fewer"):
        Structure((OfEvery(4, 4),)).check(torch.randn(4, 8), "fc1")
    with refused("conv", "convolution"):
        Structure((OfEvery(2, 4),)).check(torch.randn(4, 8, 3, 3), "conv")
    with refused("fc1", "[6, 10]", "3 x 3", "1 x 1"):
        Structure((Kernels(8),)).check(weight, "fc1")
    with refused("norm", "1 axis"):
        Structure((Largest(Tiles(1, 4), 0.5),)).check(torch.randn(4), "norm")
    with refused("not of its structure", "project"):
        pack(weight, Structure((), Ternary(0.05)))
    for value in (
        {"patterns": [{"tiles": {"rows": 1, "columns": 0}, "keep": 0.5}]},
        {"values": {"levels": 9}},
        {"lanes": 8},
    ):
        with pytest.raises(ValidationError):
            KINDS.validate_python(value)
    path = tmp_path / "packed.safetensors"
    path.write_bytes(packed({"a": Structure((), Levels(8)).project(weight)}, {"a": Structure((), Levels(8))}))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with refused(path, "compress again"):
        read_packed(path)
    path.write_bytes(whole.replace(b'\\"shape\\":[6,10]', b'\\"shape\\":[6,99]'))
    with refused("[6, 99]"):
        read_packed(path)
    path.write_bytes(whole.replace(b"sidt-packed-1", b"sidt-packed-9"))
    with refused(path, "sidt-packed-9"):
        read_packed(path)
