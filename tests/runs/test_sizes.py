"""What a run says of costs is of its images' size; one that a model does not take is said before anything is done."""

import json

import pytest

from sidt.cost.complexity import report
from sidt.errors import InputError
from sidt.runs import outcome, pipeline
from sidt.runs.config import RunConfig
from sidt.runs.folder import PLAN, dense_model, started
from sidt.settings import parse
from sidt.space.plan import load_plan
from sidt.space.space import space_for


def run_of(folder, **changes):
    values = {
        "model": {"name": "pvt_v2_b0", "args": {"num_classes": 10}},
        "data": {"name": "digits", "image_size": 32},
        "train": {"epochs": 0},
        "score": {"images": 16},
        "budget": {"macs": 0.6},
        "search": {"trials": 1, "images": 16},
        "device": "cpu",
    }
    return started(folder, parse(RunConfig, values | changes, "test"))


@pytest.mark.slow
def test_multiply_adds_and_budgets_are_of_the_images_of_the_run(tmp_path):
    run = run_of(tmp_path / "run")
    pipeline.train(run)
    outcome.evaluate(run)
    assert json.loads((run.folder / "evaluation.json").read_text())["dense"]["macs"] == 10_787_840
    pipeline.score(run)
    said = pipeline.search(run, lambda _: None)
    plan = load_plan(run.folder / PLAN, space_for(dense_model(run), (3, 32, 32)))
    dense, small = report(plan.space).macs, report(plan.space, plan.sizes).macs
    assert 0.59 * dense < small <= 0.6 * dense and f"{small / dense:.2%} of the MACs" in said


def test_a_size_that_the_model_does_not_take_is_said_first(tmp_path):
    run = run_of(tmp_path / "run", model={"name": "vit_tiny_patch16_224", "args": {"num_classes": 10}})
    with pytest.raises(InputError, match="does not take an input of 3x32x32"):
        pipeline.train(run)
    assert not (run.folder / "dense").exists()
