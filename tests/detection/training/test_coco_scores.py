"""COCO scores computed by hand, results that do not fit, and the table of scores."""

import json

import pytest

from sidt.detection.training.evaluation import results_table, score_file

CLASSES = ("cat", "dog")
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 5, "name": "unused"}, {"id": 3, "name": "dog"}]  # not sorted by id


def truth(*boxes, images=1, **other) -> dict:
    """Annotations of category 1 from (image, x, y, w, h)."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 400, "height": 400} for i in range(1, images + 1)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, "bbox": [*box], "area": box[2] * box[3], "iscrowd": 0}
            | other
            for i, (image, *box) in enumerate(boxes, start=1)
        ],
    }


def found(image, score, *box, category=1) -> dict:
    return {"image_id": image, "category_id": category, "bbox": [*box], "score": score}


@pytest.fixture
def score(tmp_path):
    """Scores of detections in memory."""

    def of(annotations, results, iou_type="bbox", **options):
        (tmp_path / "truth.json").write_text(json.dumps(annotations))
        (tmp_path / "results.json").write_text(json.dumps(results))
        return score_file(tmp_path / "truth.json", tmp_path / "results.json", iou_type, **options)

    return of


@pytest.mark.parametrize(("side", "size"), [(20, "APs"), (40, "APm"), (100, "APl")])
def test_a_perfect_box(score, side, size):
    scores = score(truth((1, 5, 5, side, side)), [found(1, 0.4, 5, 5, side, side)])
    assert {name: value for name, value in scores.items() if value is not None} == {
        name: pytest.approx(1) for name in ("AP", "AP50", "AP75", size)
    }


def test_nothing_is_printed(score, capsys):
    score(truth((1, 0, 0, 50, 50)), [])
    score(truth((1, 0, 0, 50, 50)), [found(1, 0.4, 0, 0, 50, 50)])
    assert capsys.readouterr() == ("", "")


def test_a_loose_box(score):
    """IoU 62/100: right at the thresholds 0.50, 0.55 and 0.60."""
    scores = score(truth((1, 0, 0, 100, 100)), [found(1, 0.4, 0, 0, 62, 100)])
    assert [scores[name] for name in NAMES[:3]] == pytest.approx([0.3, 1, 0])


def test_a_false_box_between_two_right_ones(score):
    """Precision 1 up to recall 0.5, which is 51 of COCO's 101 recalls, and 2/3 from there."""
    annotations = truth((1, 0, 0, 50, 50), (1, 200, 0, 50, 50))
    results = [found(1, 0.9, 0, 0, 50, 50), found(1, 0.8, 90, 90, 50, 50), found(1, 0.7, 200, 0, 50, 50)]
    assert score(annotations, results)["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_false_box_on_an_image_without_boxes(score):
    annotations = truth((1, 0, 0, 50, 50), images=2)
    results = [found(1, 0.5, 0, 0, 50, 50), found(2, 0.9, 0, 0, 50, 50)]
    assert score(annotations, results)["AP"] == pytest.approx(0.5)
    assert score(annotations, results, image_ids=[1])["AP"] == pytest.approx(1)


def test_a_box_in_a_crowd_is_neither_right_nor_wrong(score):
    annotations = truth((1, 0, 0, 50, 50), (1, 100, 100, 200, 200))
    results = [found(1, 0.5, 0, 0, 50, 50), found(1, 0.9, 150, 150, 30, 30)]
    assert score(annotations, results)["AP"] < 0.5
    annotations["annotations"][1]["iscrowd"] = 1
    assert score(annotations, results)["AP"] == pytest.approx(1)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_no_detection_scores_zero_where_there_is_something_to_find(score, iou_type):
    polygon = {"segmentation": [[0, 0, 40, 0, 40, 40, 0, 40]]}
    scores = score(truth((1, 0, 0, 40, 40), **polygon), [], iou_type, per_class=True)
    nothing = dict.fromkeys(NAMES, 0.0) | {"APs": None, "APl": None}
    assert scores == nothing | {"classes": {"cat": 0.0}}
    assert "NaN" not in json.dumps(scores)


def test_a_box_of_id_0_counts(score):
    """pycocotools itself takes a match with it for none."""
    annotations = truth((1, 0, 0, 50, 50))
    annotations["annotations"][0]["id"] = 0
    assert score(annotations, [found(1, 0.4, 0, 0, 50, 50)])["AP"] == pytest.approx(1)


def test_only_classes_of_the_detector_count(score):
    annotations = truth((1, 0, 0, 50, 50), (1, 200, 0, 50, 50))
    annotations["categories"] = CATEGORIES
    for annotation, category in zip(annotations["annotations"], (7, 5), strict=True):
        annotation["category_id"] = category
    results = [found(1, 0.4, 0, 0, 50, 50, category=7)]
    everything = score(annotations, results, per_class=True)
    assert everything["AP"] == pytest.approx(0.5)
    assert everything["classes"] == {"cat": pytest.approx(1), "unused": 0.0, "dog": None}
    assert score(annotations, results, classes=CLASSES)["AP"] == pytest.approx(1)


def test_results_that_do_not_fit_are_refused(score, tmp_path, refused):
    annotations = truth((1, 0, 0, 50, 50))
    with refused("results.json", "bbox", "category_id"):
        score(annotations, {"AP": 1})
    with refused("results.json", "segm", "segmentation"):
        score(annotations, [found(1, 0.4, 0, 0, 50, 50)], "segm")
    with refused("results.json", "image_id 8", "truth.json"):
        score(annotations, [found(8, 0.4, 0, 0, 50, 50)])
    with refused("category_id 2", "truth.json"):
        score(annotations, [found(1, 0.4, 0, 0, 50, 50, category=2)])
    with refused("2 of the 3 images", "id 5"):
        score(annotations, [], image_ids=[1, 5, 6])
    with refused("no image"):
        score(annotations, [], image_ids=[])
    with refused("lacks", "'bird'"):
        score(annotations, [], classes=("bird",))
    with refused("nowhere.json"):
        score_file(tmp_path / "truth.json", tmp_path / "nowhere.json", "bbox")


def test_table_has_the_columns_that_are_known():
    box = dict(zip(NAMES, (0.4267, 0.65, 0.4, None, 0.2, 0.3), strict=True))
    parts = {"backbone": 4_491_000_000, "neck": 20, "heads": 30}
    rows = {
        "dense": {"bbox": box, "segm": box, "params": 28_288_354, "macs": parts, "latency_ms": 3.14159},
        "sliced": {"bbox": box, "params": 17},
    }
    lines = [line.split(",") for line in results_table(rows, "csv").splitlines()]
    masks = [f"mask {name}" for name in NAMES]
    sizes = ["params", "backbone MACs", "neck MACs", "heads MACs", "latency (ms)"]
    assert lines[0] == ["model", *NAMES, *masks, *sizes]
    percent = ["42.7", "65.0", "40.0", "-", "20.0", "30.0"]
    assert lines[1] == ["dense", *percent, *percent, "28288354", "4491000000", "20", "30", "3.14"]
    assert lines[2] == ["sliced", *percent, *["-"] * 6, "17", *["-"] * 4]
    assert results_table({"a": {"bbox": box, "macs": 5}}, "csv").splitlines()[0].split(",") == ["model", *NAMES, "MACs"]
    assert "42.7 |" in results_table(rows, "md") and "28,288,354" in results_table(rows, "md")
