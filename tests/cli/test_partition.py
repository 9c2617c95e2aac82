"""``sidt partition`` on a run folder and a checkpoint, and what it refuses."""

import json
import shutil

import pytest
import torch
import yaml
from backbones import random_plan, shake
from safetensors.torch import load_file

import sidt
from sidt.export.models import create_model
from sidt.partition.shards import difference
from sidt.runs.partitioning import read_devices


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run that is sliced and not fine-tuned; no trial, no training."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny["model"]
    dense = shake(create_model(config["name"], config["args"])).eval()
    sidt.save(dense, folder / "dense", **config)
    sidt.save(
        sidt.slice_model(dense, random_plan(sidt.space_for(dense), 0, kinds=("qk", "v", "mlp"))), folder / "sliced"
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny))
    return folder


def devices(path, *values):
    path.write_text(yaml.safe_dump({"devices": [{"name": f"d{i}", **v} for i, v in enumerate(values)]}))
    return path


FAST = {"memory": 35e3, "macs_per_second": 1e8, "bandwidth": 1e9}


def test_a_run_leaves_as_shards(run, sidt_command, tmp_path):
    file = devices(tmp_path / "devices.yaml", FAST, {**FAST, "macs_per_second": 5e7}, FAST)
    code, out, err = sidt_command("partition", run, "--devices", file, "--images", 2)
    assert code == 0, err
    folder = run / "partition"
    plan = json.loads((folder / "partition.json").read_text())
    assert plan["images"] == 2 and len(plan["devices"]) > 1 and len(plan["sublayers"]) == 4
    whole = sidt.load(run / "sliced").state_dict()
    for place, says in enumerate(plan["devices"]):
        tensors = load_file(folder / says["shard"])
        assert 4 * sum(t.numel() for t in tensors.values()) == says["shard_bytes"] <= says["memory"]
        assert says["name"] in out and f"{says['shard_bytes']:,}" in out
        for sublayer in plan["sublayers"]:
            if sublayer["dimension"] == "hidden.0":
                first, last = sublayer["cells"][place]["units"]
                own = tensors.get("blocks.0.mlp.fc1.weight", torch.empty(0, 0))
                assert len(own) == last - first
                if last > first:
                    assert torch.equal(own, whole["blocks.0.mlp.fc1.weight"][first:last])
    dense, sliced = (line for line in out.splitlines() if line.startswith(("dense  ", "sliced  ")))
    assert "has no room" not in dense and "(-" in sliced  # smaller shards to ship
    assert "times its speed" in out
    code, out, err = sidt_command("partition", run, "--devices", devices(file, {**FAST, "memory": 1e6}))
    assert code == 0 and [f.name for f in folder.glob("*.safetensors")] == ["shard-0-d0.safetensors"], err


@pytest.mark.slow
def test_what_the_file_does_not_say_is_measured_and_workers_run_the_shards(run, sidt_command, tmp_path):
    half = {"memory": 35e3}
    file = devices(tmp_path / "devices.yaml", half, half)
    code, out, err = sidt_command("partition", run / "sliced", "--devices", file, "--measure")
    assert code == 0, err
    said = next(line for line in out.splitlines() if line.startswith("Measured here, 2 workers"))
    assert float(said.rsplit(" ", 1)[1].rstrip(".")) < 1e-5
    assert all(
        each["macs_per_second"] > 0
        for each in json.loads((run / "sliced/partition/partition.json").read_text())["devices"]
    )


def test_a_compression_stands_beside_the_dense_model(run, sidt_command, tmp_path):
    folder = run / "compressed" / "smcd"
    shutil.copytree(run / "sliced", folder)
    code, out, err = sidt_command(
        "partition", folder, "--devices", devices(tmp_path / "devices.yaml", FAST, FAST, FAST)
    )
    assert code == 0, err
    dense, small = (line for line in out.splitlines() if line.startswith(("dense  ", "smcd  ")))
    assert "has no room" not in dense and "(-" in small
    shutil.rmtree(folder.parent)


def test_what_cannot_be_partitioned(run, mistake, tmp_path):
    file = tmp_path / "devices.yaml"
    ask = ("partition", run, "--devices", file)
    mistake(*ask, says=["devices.yaml", "cannot read"])
    devices(file, FAST, {**FAST, "memory": 100})
    mistake(*ask, says=["d1", "no memory for any shard", "100 bytes"])
    devices(file, {**FAST, "memory": 12e3})
    mistake(*ask, says=["no cut of the model fits into d0", "add memory"])
    devices(file, {**FAST, "memory": -1})
    mistake(*ask, says=["devices.0.memory", "-1"])
    devices(file, {**FAST, "name": "d1"}, FAST)
    mistake(*ask, says=["two devices are called d1"])
    devices(file, {**FAST, "speed": 3})
    mistake(*ask, says=["speed", "unknown key", "macs_per_second"])
    file.write_text("- a")
    mistake(*ask, says=["must be a mapping"])
    devices(file, FAST)
    mistake(*ask, "--images", 0, says=["--images is 0"])
    mistake("partition", tmp_path, "--devices", file, says=["no run folder and no checkpoint"])
    (tmp_path / "config.py").write_text("")
    mistake("partition", tmp_path / "config.py", "--devices", file, says=["is a detector"])


def test_shards_that_do_not_add_up_are_refused(run, mistake, tmp_path, monkeypatch):
    monkeypatch.setattr("sidt.runs.partitioning.difference", lambda *outputs: 1e-3 + difference(*outputs))
    file = devices(tmp_path / "devices.yaml", FAST, FAST)
    mistake("partition", run, "--devices", file, says=["differ from the whole model by 1.0e-03", "above 1e-05"])


def test_the_example_is_one():
    found = read_devices(sidt_configs() / "devices.yaml")
    assert len({d.capacity for d in found}) == 4 and min(d.memory for d in found) > 0


def sidt_configs():
    from importlib import resources

    with resources.as_file(resources.files("sidt.configs") / "sparsity") as folder:
        return folder
