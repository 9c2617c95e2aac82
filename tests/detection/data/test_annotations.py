"""What is said about bad COCO annotation files, what passes, and how the images of one are split."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from pycocotools.mask import encode

from sidt.detection.data import annotations
from sidt.detection.data.annotations import Summary, check_annotations, read_annotations, write_subsets

CROWD = {"counts": [0, 400], "size": [20, 20]}


def box(number: int, image: int, category: int = 1, bbox=(2, 2, 8, 8), **other) -> dict:
    x, y, w, h = bbox
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    area = {"area": w * h, "iscrowd": 0, "segmentation": polygon}
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox)} | area | other


def instances(count: int = 4) -> dict:
    """A box in each image but the last, which is empty; in the first also a crowd and 3 that MMDetection drops."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 20} for i in range(1, count + 1)]
    boxes = [box(i, i, 1 + i % 2) for i in range(1, count)]
    crowd = box(count, 1, iscrowd=1, segmentation=CROWD)
    dropped = [box(count + 1 + i, 1, bbox=b) for i, b in enumerate(((5, 5, 0, 4), (5, 5, 0.5, 4), (30, 30, 5, 5)))]
    categories = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "unused"), start=1)]
    return {
        "info": {"year": 2026},
        "images": images,
        "annotations": [*boxes, crowd, *dropped],
        "categories": categories,
    }


def write(folder: Path, data) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(data))
    return path


def test_counts_and_what_is_legal(tmp_path):
    path = write(tmp_path, instances())
    for image in range(1, 5):
        (tmp_path / f"{image}.png").touch()
    expected = Summary(images=4, boxes=3, crowd=1, dropped=3, empty_images=1, categories=3)
    assert check_annotations(path, tmp_path, masks=True) == expected
    assert check_annotations(path, tmp_path, ("cat", "dog", "unused"), masks=True) == expected


def test_only_the_classes_of_the_detector_count(tmp_path):
    path = write(tmp_path, instances())
    assert check_annotations(path, classes=("dog",)) == Summary(4, 2, 0, 0, empty_images=2, categories=1)


@pytest.mark.parametrize("classes", [("cat",), ("dog",)])
def test_kept_boxes_are_those_of_mmdetection(tmp_path, classes):
    path = write(tmp_path, instances())
    dataset = CocoDataset(ann_file=str(path), data_prefix={"img": ""}, metainfo={"classes": classes}, pipeline=[])
    kept = [one for i in range(len(dataset)) for one in dataset.get_data_info(i)["instances"]]
    summary = check_annotations(path, classes=classes)
    assert summary.boxes == sum(not one["ignore_flag"] for one in kept)
    assert summary.boxes + summary.crowd == len(kept)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"image_id":', '"image_id": 3, "image_id":'),
        ('"bbox":', '"bbox" : [1, 2, 3, 4], "bbox":'),
        ('"images":', '"images": [], "images":'),
        ('"iscrowd":', '"i\\u0073crowd": 0, "iscrowd":'),
        ('"id":', '"\\u003a": 1, "id": 7, "id":'),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, refused, old, new):
    path = write(tmp_path, instances())
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with refused(path, "is there twice"):
        read_annotations(path)


def test_colons_that_are_no_keys(tmp_path, monkeypatch):
    """In names, values, lists of both, and with spaces: read as they are, most of them by the fast parser alone."""
    data = instances()
    data["info"] = {"at": "12:30:00", "urls": ["http://x:1", {"u": ["::"]}], "none": [], "3": [1, "a:b", {"c:d": 1}]}
    path = write(tmp_path, data)
    spaced = tmp_path / "spaced.json"
    spaced.write_text(json.dumps(data, separators=(" , ", " : ")))
    assert read_annotations(path) == read_annotations(spaced) == data
    del data["info"]["3"]  # a list that begins with a number may hold others, and a key a colon
    path.write_text(json.dumps(data))
    monkeypatch.setattr(annotations, "read_json", lambda path: 1 / 0)
    assert read_annotations(path) == data


def broken(change) -> dict:
    data = instances()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("annotations"), ("not a COCO instances file", "annotations", "info, images, categories")),
        (lambda d: d.update(images={}), ("not a COCO instances file",)),
        (lambda d: d["images"].append(3), ("images[4]", "3", "object")),
        (lambda d: d["images"][1].pop("file_name"), ("images[1]", "no file_name")),
        (lambda d: d["images"][1].update(width="20"), ("images[1]", "width", '"20"')),
        (lambda d: d["annotations"][2].pop("area"), ("annotations[2]", "no area")),
        (lambda d: d["annotations"][2].update(area=float("nan")), ("annotations[2]", "area", "NaN")),
        (lambda d: d["annotations"][0].pop("iscrowd"), ("annotations[0]", "no iscrowd")),
        (lambda d: d["annotations"][0].update(bbox=None), ("annotations[0]", "bbox", "null")),
        (lambda d: d["images"][1].update(id=1), ("id 1", "twice", "images")),
        (lambda d: d["annotations"][1].update(id=1), ("id 1", "twice", "annotations")),
        (lambda d: d["categories"][1].update(id=1), ("id 1", "twice", "categories")),
        (lambda d: d["annotations"][1].update(image_id=77), ("annotation 2", "image_id 77", "4 images")),
        (lambda d: d["annotations"][1].update(category_id=9), ("annotation 2", "category_id 9", "3 categories")),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), ("annotation 2", "[1, 2, 3]", "4 finite numbers")),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("inf")]), ("annotation 2", "Infinity")),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, "4"]), ("annotation 2", '"4"')),
        (lambda d: d.update(images=[], annotations=[]), ("no image",)),
        (lambda d: d.update(annotations=[]), ("no box", "0 annotations")),
        (lambda d: [a.update(bbox=[0.1, 0.1, 0.4, 0.4]) for a in d["annotations"]], ("no box", "pixels")),
        (lambda d: [a.update(iscrowd=1) for a in d["annotations"]], ("no box", "7 of those are crowds")),
    ],
)
def test_bad_files_are_refused(tmp_path, refused, change, words):
    path = write(tmp_path, broken(change))
    with refused(path, *words):
        check_annotations(path)


def test_missing_truncated_and_other_files(tmp_path, refused):
    with refused("nowhere.json"):
        check_annotations(tmp_path / "nowhere.json")
    path = write(tmp_path, instances())
    path.write_text(path.read_text()[:-40])
    with refused(path, "not valid JSON", "truncated"):
        check_annotations(path)
    with refused("not a COCO instances file", "list"):
        check_annotations(write(tmp_path, [{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0}]))


def test_missing_images(tmp_path, refused):
    data = instances()
    data["images"][2]["file_name"] = "more/3.png"
    path = write(tmp_path, data)
    (tmp_path / "1.png").touch()
    with refused("3 of the 4 images", tmp_path, "2.png first"):
        check_annotations(path, tmp_path)
    (tmp_path / "more").mkdir()
    for name in ("2.png", "more/3.png", "4.png"):
        (tmp_path / name).touch()
    check_annotations(path, tmp_path)
    with refused("4 of the 4 images", "no such folder", tmp_path / "elsewhere"):
        check_annotations(path, tmp_path / "elsewhere")


def test_classes_that_the_file_lacks(tmp_path, refused):
    path = write(tmp_path, instances())
    with refused(
        "2 of the detector's 3 classes: 'bird', 'Dog'", "'cat', 'dog', 'unused'", "metainfo=dict(classes=...)"
    ):
        check_annotations(path, classes=("cat", "bird", "Dog"))


def test_classes_in_another_order(tmp_path, refused):
    """MMDetection labels by the file's order, whatever that of ``classes``."""
    path = write(tmp_path, instances())
    with refused("'cat', 'dog'", "'dog', 'cat'", "one order"):
        check_annotations(path, classes=("dog", "cat"))
    twice = write(tmp_path, broken(lambda d: d["categories"][2].update(name="cat")))
    with refused("'cat', 'dog', 'cat'", "once"):
        check_annotations(twice, classes=("cat", "dog"))


@pytest.mark.parametrize("place", [0, 3])  # a box, a crowd
def test_masks(tmp_path, refused, place):
    path = write(tmp_path, broken(lambda d: d["annotations"][place].update(segmentation=[])))
    check_annotations(path)
    with refused("1 of 4 annotations", "segmentation", f"{place + 1} first"):
        check_annotations(path, masks=True)


NAN = float("nan")


@pytest.mark.parametrize(
    "mask",
    [
        [[]],
        [[2, 2, 8, 2]],
        [[2, 2, 8, 2, 8]],
        [[2, 2, 8, 2, 8, 8, 2]],
        [[2, 2, 8, 2, 8, 8], []],
        [[2, 2, 8, 2, NAN, 8]],
        [[2, 2, 8, 2, float("inf"), 8]],
        [[2, 2, 8, 2, "8", 8]],
        [2, 2, 8, 2, 8, 8],
        "mask",
        {"counts": [0, 400]},
        {"size": [20, 20]},
        {"counts": [0, 399], "size": [20, 20]},
        {"counts": [-1, 401], "size": [20, 20]},
        {"counts": [0, 100], "size": [10, 10]},
        {"counts": [0.0, 400.0], "size": [20, 20]},
        {"counts": "`<", "size": [20, 10]},
        {"counts": "`", "size": [20, 20]},
        {"counts": "0`<1", "size": [20, 20]},
        {"counts": 400, "size": [20, 20]},
    ],
    ids=str,
)
def test_what_is_no_mask(tmp_path, refused, mask):
    path = write(tmp_path, broken(lambda d: d["annotations"][1].update(segmentation=mask)))
    check_annotations(path)
    with refused(path, "1 of 4 segmentations", "annotation 2", json.dumps(mask)[:40], "3 points"):
        check_annotations(path, masks=True)


def test_masks_that_pycocotools_writes(tmp_path):
    """Compressed runs of random masks, empty and full ones too, and polygons of several parts."""
    generator = np.random.default_rng(0)
    data = instances(40)
    for annotation in data["annotations"][:30]:
        pixels = generator.random((20, 20)) < annotation["id"] / 30
        encoded = encode(np.asfortranarray(pixels.astype(np.uint8)))
        annotation["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    data["annotations"][31]["segmentation"] = [[2, 2, 8.5, 2, 8, 8], [1, 1, 4, 1, 4, 4, 1, 4]]
    assert check_annotations(write(tmp_path, data), masks=True).boxes == 39


def test_many_images_are_checked_quickly(tmp_path):
    for image in range(1, 2001):
        (tmp_path / f"{image}.png").touch()
    path = write(tmp_path, instances(2000))
    start = time.perf_counter()
    check_annotations(path, tmp_path)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(("held", "count"), [(3, 3), (0.25, 5), (0.124, 2)])
def test_subsets_are_disjoint_and_complete(tmp_path, held, count):
    data = instances(20)
    path = write(tmp_path, data)
    files = write_subsets(path, tmp_path / "parts", held=held, seed=1)
    parts = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert [files[name].name for name in parts] == ["rest.json", "holdout.json", "fresh.json"]
    assert len(parts["holdout"]["images"]) == len(parts["fresh"]["images"]) == count
    for key in ("images", "annotations"):
        together = [entry for part in parts.values() for entry in part[key]]
        assert sorted(together, key=lambda e: e["id"]) == data[key]
    for name, part in parts.items():
        assert part["info"] == data["info"] and part["categories"] == data["categories"]
        ids = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= ids
        assert name == "rest" or 20 not in ids, "an image without boxes is not held out"


def test_subsets_are_seeded(tmp_path):
    path = write(tmp_path, instances(20))

    def held_out(seed):
        files = write_subsets(path, tmp_path, held=5, seed=seed)
        return [files[name].read_text() for name in files]

    assert held_out(1) == held_out(1) != held_out(2)


@pytest.mark.parametrize(("held", "count"), [(3, 3), (0.25, 2)])  # of the 9 images with a cat
def test_subsets_of_some_classes(tmp_path, refused, held, count):
    path = write(tmp_path, instances(20))
    files = write_subsets(path, tmp_path / "parts", held=held, seed=1, classes=["cat"])
    for part in ("holdout", "fresh"):
        data = json.loads(files[part].read_text())
        assert len(data["images"]) == count and all(a["category_id"] == 1 for a in data["annotations"])
    with refused("9 with boxes of the classes", 5):
        write_subsets(path, tmp_path / "parts", held=5, seed=1, classes=["cat"])


@pytest.mark.parametrize("held", [0, 0.5, 0.7, 1.5, -3, float("nan")])
def test_subsets_of_no_size(tmp_path, refused, held):
    with refused("held", held):
        write_subsets(write(tmp_path, instances(20)), tmp_path, held=held, seed=0)


@pytest.mark.parametrize("held", [10, 0.01, 0.49])  # 20 of the 19 with boxes, none, and none left with boxes
def test_subsets_of_too_few_images(tmp_path, refused, held):
    with refused("20 images", "19 with boxes", held):
        write_subsets(write(tmp_path, instances(20)), tmp_path / "parts", held=held, seed=0)
    assert not (tmp_path / "parts").exists()
