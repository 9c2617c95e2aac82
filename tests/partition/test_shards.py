"""Shards together compute what the model computes: all backbones, dense and sliced."""

import numpy as np
import pytest
import torch
from backbones import PVT, SWIN, TIMM_BACKBONES, VIT_TINY, dense, random_plan

import sidt
from sidt.errors import InputError
from sidt.partition.devices import Device
from sidt.partition.planner import partition
from sidt.partition.shards import assembled, difference, shard_of
from sidt.partition.workload import workload_of
from sidt.space.space import space_for


def devices_for(load):
    """Four unequal devices; only one holds the whole model, so that both rows and units are cut."""
    inner = load.bytes - load.rest_bytes
    rooms = {"a": (0.8, 3e9), "b": (0.8, 2e9), "c": (1.0, 3e9), "d": (0.5, 1e9)}
    return [
        Device(name=n, memory=load.rest_bytes + part * inner, macs_per_second=speed, bandwidth=1e10)
        for n, (part, speed) in rooms.items()
    ]


# Attention and MLP side by side in one module are one piece.
IN_ONE_PIECE = [b for b in TIMM_BACKBONES if any(word in b.name for word in ("_xp_", "pwee"))]


@pytest.mark.parametrize("backbone", IN_ONE_PIECE, ids=str)
def test_what_is_one_piece(backbone, refused):
    with refused("one piece"):
        workload_of(*dense(backbone), 2)


@pytest.mark.parametrize("backbone", [b for b in TIMM_BACKBONES if b not in IN_ONE_PIECE], ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["dense", "sliced"])
def test_shards_add_up_to_the_model(backbone, sliced):
    model, space = dense(backbone)
    if sliced:
        model = sidt.slice_model(model, random_plan(space, 0))
        space = space_for(model, space.trace.input_size)
    load = workload_of(model, space, 2)
    assert load.bytes == 4 * sum(p.numel() for p in model.parameters())
    assert load.macs == pytest.approx(2 * sidt.measure(model, space.trace.input_size).macs)
    cut = partition(load, devices_for(load))
    assert all(grid.covered_once() for grid in cut.grids)
    with torch.no_grad():
        expected = model(backbone.images(2))
        assert difference(assembled(model, space, cut)(backbone.images(2)), expected) < 1e-5
    for index, each in enumerate(cut.devices):
        held = 4 * sum(p.numel() for p in shard_of(model, space, cut, index).parameters())
        assert held == cut.shard_bytes(index) <= each.memory


@pytest.mark.parametrize("backbone", [VIT_TINY, SWIN, PVT], ids=str)
def test_what_is_cut_both_ways(backbone):
    model, space = dense(backbone)
    load = workload_of(model, space, 2)
    grids = partition(load, devices_for(load)).grids
    assert any(len({c.rows for c in g.cells if not c.empty}) > 1 for g in grids)
    assert any(len({c.units for c in g.cells if not c.empty}) > 1 for g in grids)
    rows = {s.kind: (s.rows, s.tokens) for s in load.sublayers[:2]}
    expected = {VIT_TINY: ((2, 17), (34, 1)), SWIN: ((32, 49), (1568, 1)), PVT: ((2, 256), (2, 256))}
    assert (rows["heads"], rows["mlp"]) == expected[backbone]  # images or windows; tokens unless the MLP convolves


def test_a_sublayer_without_units_is_no_work():
    model, space = dense(VIT_TINY)
    plan = sidt.DimensionPlan(space, {"heads.0": np.arange(0), "hidden.1": np.arange(0)})
    small = sidt.slice_model(model, plan)
    own = space_for(small)
    load = workload_of(small, own, 2)
    assert [s.dimension for s in load.sublayers] == ["hidden.0", "heads.1"]
    images = VIT_TINY.images(2)
    with torch.no_grad():
        assert difference(assembled(small, own, partition(load, devices_for(load)))(images), small(images)) < 1e-5
    everything = {f"{kind}.{i}": np.arange(0) for kind in ("heads", "hidden") for i in range(2)}
    none = sidt.slice_model(model, sidt.DimensionPlan(space, everything))
    with pytest.raises(InputError, match="no heads and no hidden units"):
        workload_of(none, space_for(none))


def test_another_batch_is_refused(refused):
    model, space = dense(VIT_TINY)
    load = workload_of(model, space, 2)
    together = assembled(model, space, partition(load, devices_for(load)))
    with refused("made for 2 rows", "given 3"):
        together(VIT_TINY.images(3))
