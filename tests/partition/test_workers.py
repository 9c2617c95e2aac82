"""The partitioned model in several processes, and how their errors end."""

import pytest
import timm
import torch
from backbones import shake
from failing import sleep_or_fail
from torch import nn

from sidt.errors import InputError
from sidt.partition.devices import Device
from sidt.partition.planner import partition
from sidt.partition.processes import run_together
from sidt.partition.shards import difference, shard_of
from sidt.partition.workers import calibrate, run_partition
from sidt.partition.workload import workload_of
from sidt.space.space import space_for


def small_vit() -> tuple[nn.Module, torch.Tensor]:
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    return shake(timm.create_model("vit_tiny_patch16_224", **args)).eval(), torch.randn(2, 3, 16, 16)


@pytest.mark.slow
def test_workers_give_the_output_of_the_model_and_the_time_of_its_pieces():
    model, images = small_vit()
    space = space_for(model)
    load = workload_of(model, space, 2)
    half = load.rest_bytes + 0.6 * (load.bytes - load.rest_bytes)
    rooms = {"a": 1e9, "b": half, "c": half}
    devices = [Device(name=n, memory=m, macs_per_second=1e6, bandwidth=1e12) for n, m in rooms.items()]
    cut = partition(load, devices)
    assert len(cut.devices) == 3
    grids = cut.grids
    assert max(len({c.rows for c in g.cells if not c.empty}) for g in grids) > 1
    assert max(len({c.units for c in g.cells if not c.empty}) for g in grids) > 1
    shards = [shard_of(model, space, cut, index) for index in range(3)]
    found = run_partition(model, space, cut, shards, images, rounds=2, timeout=120)
    with torch.no_grad():
        assert difference(found.output, model(images)) < 1e-5
    assert found.seconds > 0 and found.predicted.seconds > 0
    assert [g.cells for g in found.predicted.grids] == [g.cells for g in cut.grids]
    assert found.predicted.workload.macs == pytest.approx(load.macs)


def test_one_worker_is_measured_without_a_link():
    model, images = small_vit()
    load = workload_of(model, space_for(model), 2)
    timed, (here,) = calibrate(model, load, [Device(name="here", memory=1e9)], images, rounds=2, timeout=120)
    assert here.capacity > 0 and here.latency == 0
    assert timed.macs == pytest.approx(load.macs) and timed.bytes == load.bytes
    assert partition(timed, [here]).seconds == pytest.approx(timed.macs / here.capacity)


@pytest.mark.parametrize(
    ("work", "error", "says"),
    [
        (["input"], InputError, "cannot be used"),
        (["bug"], RuntimeError, "worker 0 failed:.*ZeroDivisionError: bug"),
        (["wait", "die"], RuntimeError, "worker 1 died"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_an_error_in_a_worker_ends_all(work, error, says):
    with pytest.raises(error, match=f"(?s){says}"):
        run_together(sleep_or_fail, [(what,) for what in work], [1] * len(work), 60)


def test_workers_that_wait_for_ever_are_ended():
    with pytest.raises(InputError, match=r"did not end within 0\.1 s"):
        run_together(sleep_or_fail, [("wait",)], [1], 0.1)
