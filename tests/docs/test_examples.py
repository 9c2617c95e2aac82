"""The examples run, at a small size."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from PIL import Image
from pycocotools.coco import COCO
from test_imports import ROOT

EXAMPLES = {
    "shrink_classifier": "--folder small --epochs 1",
    "own_space": "--epochs 1",
    "own_loss": "--epochs 1 --trials 3",
    "detector": "--folder detector --images 40 --epochs 1 --trials 2",
    "blood_cells": "voc cells --classes ring,dot",
    "segmentation": "--folder segmentation --images 40 --epochs 1",
    "pareto_curve": "--picture curve.png --epochs 1 --trials 3",
}


def test_every_example_is_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}.py]({name}.py)" in table for name in EXAMPLES)


NEEDS = {"detector": "mmdet", "segmentation": "mmseg"}


def write_voc(folder):
    """Two images to train on, one of them without boxes, and one to test on, as Pascal VOC has them."""
    thing = (
        "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>20</xmax><ymax>40</ymax></bndbox></object>"
    )
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name, things in {"a": thing.format("dot") + thing.format("ring"), "b": "", "c": thing.format("ring")}.items():
        size = "<size><width>64</width><height>48</height></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{things}</annotation>")
        Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / f"{name}.jpg")
    (folder / "ImageSets/Main/trainval.txt").write_text("a\nb\n")
    (folder / "ImageSets/Main/test.txt").write_text("c\n")


def test_corners_that_count_from_one_become_boxes(tmp_path):
    write_voc(tmp_path / "voc")
    words = [sys.executable, str(ROOT / "examples/blood_cells.py"), *EXAMPLES["blood_cells"].split()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = COCO(tmp_path / "cells/annotations/instances_train.json")
    assert [len(file.getAnnIds([image])) for image in (1, 2)] == [2, 0]
    assert [a["bbox"] for a in file.loadAnns([1, 2])] == [[0, 10, 20, 30]] * 2
    assert [file.cats[a["category_id"]]["name"] for a in file.loadAnns([1, 2])] == ["dot", "ring"]
    assert sorted(path.name for path in (tmp_path / "cells/train").iterdir()) == ["a.jpg", "b.jpg"]
    assert [path.name for path in (tmp_path / "cells/test").iterdir()] == ["c.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    need = NEEDS.get(name)
    if need is not None and find_spec(need) is None:
        pytest.skip(f"the example needs {need}, which is not installed")
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / f"{name}.py"), *EXAMPLES[name].split()]
    if name == "blood_cells":
        write_voc(tmp_path / "voc")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
