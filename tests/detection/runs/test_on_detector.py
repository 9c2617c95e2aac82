"""A run whose budget is of the whole detector: the channels of its neck and heads are cut, trained and reported."""

import json

import pytest
from click.testing import CliRunner
from mmdet.apis import DetInferencer
from pages import Page
from small_detector import SEARCH, small_config, small_digits, write_checkpoint

from sidt.cli.commands import cli
from sidt.detection.detectors.checkpoints import load_detector


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """Searched, fine-tuned with its teacher, evaluated, reported."""
    folder = tmp_path_factory.mktemp("whole")
    config = small_config(folder, SEARCH.replace("params=0.6", "macs=0.15") + f"data_root = {str(data)!r}\n")
    start = ["detect", "search", str(config), "--out", str(folder / "run"), "--data-root", str(data)]
    for arguments in (
        [*start, "--checkpoint", str(write_checkpoint(folder, config)), "--on", "detector", "--objective", "loss"],
        ["detect", "finetune", str(folder / "run"), "--teacher"],
        ["detect", "evaluate", str(folder / "run"), "--no-latency"],
        ["detect", "report", str(folder / "run")],
    ):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)
        assert result.exit_code == 0, result.output
    return folder / "run"


def test_the_budget_is_met_by_neck_and_head_too(run):
    rows = json.loads((run / "evaluation.json").read_text())
    dense, tuned = (rows[name]["macs"] for name in ("dense", "fine-tuned"))
    assert sum(tuned.values()) <= 0.15 * sum(dense.values())
    assert all(tuned[part] < dense[part] for part in ("backbone", "neck", "bbox_head"))
    found = json.loads((run / "search" / "search.json").read_text())
    assert found["parts"]["neck"]["sliced"][1] == tuned["neck"]


def test_the_files_fit_each_other(run):
    plan = json.loads((run / "plan.json").read_text())
    assert plan == json.loads((run / "search" / "plan.json").read_text()) and len(plan["channels"]) == 4
    cut = {n: len(plan["keep"][n]) for n in plan["channels"] if len(plan["keep"][n]) < plan["dense"][n]}
    assert cut and all(name.startswith(("neck.", "bbox_head.")) for name in cut)
    for folder in (run / "sliced", run):
        detector, _ = load_detector(folder)
        assert detector.sidt_plan.to_json() == plan
        assert all(len(detector.get_submodule(name).weight) in (size, 4 * size) for name, size in cut.items())
    (log,) = (run / "states").glob("*/*/vis_data/scalars.json")
    losses = [json.loads(line).get("loss_teacher") for line in log.read_text().splitlines()]
    assert losses and all(loss is None or loss > 0 for loss in losses)


def test_the_complexity_is_that_of_the_run(run):
    result = CliRunner().invoke(cli, ["complexity", str(run), "--format", "json"], standalone_mode=False)
    found, rows = json.loads(result.output)["models"]["sliced"], json.loads((run / "evaluation.json").read_text())
    assert {n: part["macs"] for n, part in found.items() if n != "total"} == rows["sliced"]["macs"]


def test_the_page_shows_them(run):
    page = Page(run / "report.html")
    page.check()
    assert "outside" in page.text and "neck.fpn_convs.0.conv" in page.text


def test_mmdetection_takes_it(run, data):
    inferencer = DetInferencer(str(run / "config.py"), str(run / "model.safetensors"), device="cpu")
    (found,) = inferencer(str(sorted((data / "val").glob("*.png"))[0]), no_save_vis=True)["predictions"]
    assert len(found["bboxes"]) == len(found["scores"])
