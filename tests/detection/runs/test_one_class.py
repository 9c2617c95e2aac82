"""A detector that knows one of the classes of its file: what it is searched on."""

import json

import pytest
import torch
from small_detector import SEARCH, opened, small_config, small_digits

from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.runs import pipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_digits(tmp_path_factory.mktemp("data"))


def one_class(folder, data):
    """The config of a detector of one of the ten digits, and its run with random weights."""
    path = folder / "one.py"
    loaders = "".join(
        f"{name} = dict(dataset=dict(metainfo=dict(classes=('3',))))\n"
        for name in ("train_dataloader", "val_dataloader", "test_dataloader")
    )
    small_config(folder).rename(path)
    text = path.read_text().replace("bbox_head=dict(", "bbox_head=dict(num_classes=1, ")
    path.write_text(text + SEARCH + loaders)
    torch.manual_seed(0)
    torch.save(build_detector(read_config(path)).state_dict(), folder / "one.pth")
    run = opened(path, data, folder / "run", holdout=3)
    pipeline.take_checkpoint(run, folder / "one.pth")
    return run


def test_a_detector_of_one_class_is_judged_on_images_that_have_it(data, tmp_path):
    run = one_class(tmp_path, data)
    pipeline.search(run, print)
    for part in ("holdout", "fresh"):
        split = json.loads((run.folder / "data" / f"{part}.json").read_text())
        (three,) = [c["id"] for c in split["categories"] if c["name"] == "3"]
        having = {a["image_id"] for a in split["annotations"] if a["category_id"] == three}
        assert {image["id"] for image in split["images"]} == having and len(having) == 3


@pytest.mark.slow
def test_images_that_cannot_judge_are_said_before_the_first_trial(data, tmp_path, refused):
    """A split of an earlier version, which held out images without the class."""
    run = one_class(tmp_path, data)
    pipeline.search(run, print)
    fresh = run.folder / "data" / "fresh.json"
    split = json.loads(fresh.read_text())
    kept = split["images"][0]["id"]
    split["annotations"] = [a for a in split["annotations"] if a["image_id"] == kept or a["category_id"] == 1]
    fresh.write_text(json.dumps(split))
    said = []
    with refused("3 groups", "fresh.json"):
        pipeline.search(run, said.append)
    assert not any("trials" in line for line in said)
