"""A detector's backbone, and the detector before its boxes are decoded, as ONNX files."""

import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from small_detector import SEARCH, random_detector, small_config
from torch.testing import assert_close

from sidt.allocation.greedy import uniform
from sidt.cli.commands import cli
from sidt.cost.budget import Budget
from sidt.detection.detectors.checkpoints import load_detector, save_detector
from sidt.detection.detectors.configs import read_config
from sidt.detection.detectors.space import detector_space
from sidt.surgery.slicing import slice_model

SIZE = (3, 64, 64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose detector is sliced: 60 % of the backbone, q/k, v and MLP alike."""
    folder = tmp_path_factory.mktemp("run")
    config = read_config(small_config(tmp_path_factory.mktemp("config"), SEARCH))
    detector = random_detector(config)
    save_detector(detector, config, folder / "dense", [str(i) for i in range(10)])
    plan = uniform(detector_space(detector, config.model, SIZE), Budget(params=0.6))
    save_detector(slice_model(detector, plan), config, folder / "sliced", [str(i) for i in range(10)])
    return folder


def exported(*arguments):
    result = CliRunner().invoke(cli, ["export", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("part", ["backbone", "detector"])
@pytest.mark.slow
def test_the_sliced_detector_leaves_beside_the_dense_one(run, part):
    said = exported(run, "--input", "3x64x64", "--part", part)
    names = [line.split()[0] for line in said.splitlines()[2:4]]
    assert names == ["dense", "sliced"] and f"{part}.onnx" in said
    detector, _ = load_detector(run / "sliced")
    image = torch.randn(1, *SIZE)
    with torch.no_grad():
        maps = detector.backbone(image)
        expected = maps if part == "backbone" else [y for levels in detector(image, mode="tensor") for y in levels]
    session = onnxruntime.InferenceSession(run / f"{part}.onnx")
    seen = [torch.from_numpy(y) for y in session.run(None, {"images": image.numpy()})]
    assert_close(seen, [*expected], rtol=1e-4, atol=1e-4)
    assert [output.name for output in session.get_outputs()] == [f"output{i}" for i in range(len(seen))]


def test_what_has_no_sliced_detector_is_one_line(run, tmp_path, refused):
    (tmp_path / "dense").mkdir()
    for name in ("config.py", "model.safetensors"):
        (tmp_path / "dense" / name).symlink_to(run / "dense" / name)
    with refused("sidt detect search", tmp_path):
        exported(tmp_path)
    with refused("config.py", run / "dense" / "config.py"):
        exported(run / "dense" / "config.py")
    with refused("--random-weights"):
        exported(run, "--random-weights")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
