"""``sidt compress`` on a detection run: stages, the packed folder, and mistakes."""

import json
import shutil

import pytest
import torch
from backbones import random_plan
from click.testing import CliRunner
from mmdet.apis import init_detector
from safetensors.torch import load_file, save_file
from small_detector import CONFIGS, random_detector, small_config, small_digits

from sidt.cli.commands import cli
from sidt.detection.data.sources import move_data
from sidt.detection.detectors.checkpoints import load_detector, load_weights, read_checkpoint, save_detector
from sidt.detection.detectors.configs import read_config
from sidt.detection.detectors.space import detector_space
from sidt.detection.runs.compressing import compress
from sidt.detection.runs.folder import open_run
from sidt.sparsity.config import LayersConfig, structures_of
from sidt.sparsity.packing import read_packed
from sidt.surgery.slicing import slice_model

REST = "param_scheduler = []\nsidt = dict(holdout=4)\n"
CLASSES = tuple("0123456789")
PATTERNS = (CONFIGS.parent / "sparsity" / "patdnn.yaml").read_text().replace("epochs: 3", "epochs: 1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a dense and a sliced detector, as a search leaves them."""
    folder = tmp_path_factory.mktemp("run")
    small_digits(folder)
    config = read_config(small_config(folder, REST))
    move_data(config, folder / "digits")
    detector = random_detector(config)
    save_detector(detector, config, folder / "dense", CLASSES)
    space = detector_space(detector, config.model, (3, 64, 64))
    save_detector(slice_model(detector, random_plan(space, seed=1)), config, folder / "sliced", CLASSES)
    return folder


def command(run, config, *options):
    return CliRunner().invoke(cli, ["compress", str(run), "--config", str(config), *options], standalone_mode=False)


@pytest.fixture(scope="module")
def compressed(run):
    """The config of the digits detector as it is in configs/, with fewer rounds."""
    config = run / "patdnn.yaml"
    config.write_text(PATTERNS.replace("rounds: 3", "rounds: 2"))
    result = command(run, config)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return run / "compressed" / "patdnn", result.output


def test_a_run_leaves_numbers_a_report_and_a_picture(run, compressed):
    folder, said = compressed
    found = json.loads((folder / "compressed.json").read_text())
    assert all(0 <= (found[stage]["bbox"]["AP"] or 0) <= 1 for stage in ("before", "projected", "after"))
    assert found["bytes"] == (folder / "packed.safetensors").stat().st_size < found["dense_bytes"]
    assert set(found["latency_ms"]) == {"dense convolutions", "packed convolutions"}
    kernels = found["weights"]["bbox_head.cls_convs.0.conv.weight"]
    assert kernels["shape"] == [16, 16, 3, 3] and kernels["nonzero"] == kernels["values"] // 32 == 16 * 16 // 2 * 4
    report = (folder / "report.md").read_text()
    assert report in said and "| before" in report and "packed convolutions" in report and "epochs: admm 2" in said
    assert "neck.fpn_convs.*.conv.weight" in report and (folder / "structure.png").stat().st_size > 1000


def test_the_packed_folder_is_the_detector_bit_for_bit(run, compressed):
    folder = compressed[0]
    detector, _ = load_detector(folder)
    state, structures = read_packed(folder / "packed.safetensors")
    assert detector.state_dict().keys() == state.keys() and len(structures) == 6
    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())
    assert all(torch.equal(s.project(state[name]), state[name]) for name, s in structures.items())
    assert not (folder / "model.safetensors").exists() and (folder / "plan.json").is_file()
    states = next((folder / "states").glob("finetune-*"))
    checkpoint = read_checkpoint(states / (states / "last_checkpoint").read_text().split("/")[-1])
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.items())  # masks held all the time
    again = run / "again"
    save_detector(detector, load_detector(run / "sliced")[1], again, CLASSES, structures)
    files = [load_file(one / "packed.safetensors") for one in (folder, again)]
    assert files[0].keys() == files[1].keys() and all(torch.equal(t, files[1][n]) for n, t in files[0].items())
    theirs = init_detector(str(folder / "config.py"), str(folder / "packed.safetensors"), device="cpu")
    assert theirs.dataset_meta["classes"] == list(CLASSES)
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())
    save_detector(detector, load_detector(run / "sliced")[1], again, CLASSES)
    assert not (again / "packed.safetensors").exists()


def test_the_dense_detector_without_training(run, tmp_path, refused):
    shutil.copytree(run / "dense", tmp_path / "dense")
    run, config = tmp_path, tmp_path / "levels.yaml"
    config.write_text('structures: [{layers: "bbox_head.*_convs.*.conv.weight", structure: {values: {levels: 4}}}]\n')
    with refused("sliced", "sidt detect search"):
        compress(open_run(run), config)
    said = []
    compress(open_run(run), config, dense=True, say=said.append)
    folder = run / "compressed" / "dense-levels"
    dense, levels = load_detector(run / "dense")[0], load_detector(folder)[0]
    asked = LayersConfig(layers="bbox_head.*_convs.*.conv.weight", structure={"values": {"levels": 4}})
    structures = structures_of(dense, [asked], None)
    for name, weight in dense.state_dict().items():
        wanted = structures[name].project(weight) if name in structures else weight
        assert torch.equal(levels.state_dict()[name], wanted)
    assert "no training" in said[0] and [line.split(":")[0] for line in said[1:]] == ["before", "after"]
    assert not (folder / "states").exists() and not (folder / "projected").exists()


def test_damaged_folders_are_named(run, compressed, tmp_path, refused):
    folder = tmp_path / "broken"
    shutil.copytree(compressed[0], folder, ignore=shutil.ignore_patterns("states", "projected"))
    packed = folder / "packed.safetensors"
    with refused("packed.safetensors", "not this model's"):
        load_weights(load_detector(run / "dense")[0], packed)  # another model's
    packed.write_bytes(packed.read_bytes()[:-100])
    with refused("packed.safetensors"):
        load_detector(folder)
    packed.unlink()
    with refused("no detector", "packed.safetensors"):
        load_detector(folder)
    save_file({"a": torch.zeros(1)}, packed)
    with refused("no packed file"):
        load_detector(folder)


STRUCTURES = "structures: [{layers: neck.*_convs.*.conv.weight, structure: {values: {levels: 8}}}]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STRUCTURES + "unused: true\nimages: 9\n", ["unused, images", "of a detector"]),
        (STRUCTURES + "engine: int8\n", ["engine: int8"]),
        (STRUCTURES + "teacher: {features: 0.0}\n", ["teacher.features: 0"]),
        ("reach: {by: hoyer, groups: units}\n", ["reach.groups: units"]),
        ("engine: patterns\nunused: false\n", ["nothing to do"]),
        (STRUCTURES.replace("neck.*_convs", "rpn_head.*"), ["rpn_head.*", "neck.lateral_convs.0.conv.weight"]),
        (STRUCTURES.replace("{values: {levels: 8}}", "{patterns: [{patterns: 8}]}"), ["lateral_convs", "1 x 1"]),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, refused, text, words):
    config = tmp_path / "wrong.yaml"
    config.write_text(text)
    with refused(*words):
        compress(open_run(run), config, say=lambda _: None)
    assert not (run / "compressed" / "wrong").exists()
