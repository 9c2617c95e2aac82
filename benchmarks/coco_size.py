"""What data of COCO's size costs: to read, check and split its annotations, and to score detections in its images.

    python benchmarks/coco_size.py [--images 118000] [--boxes 860000]

All is made up: a file of as many images and boxes as COCO's training set, a polygon of 18 points for each box, and of
each set of images to score, three boxes near every true one and as many others as make 100 an image. Each piece of work
with a file has a process of its own, so that its peak of memory is its own.
"""

import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from results import environment, write_results

from sidt.detection.data.annotations import check_annotations, read_annotations, write_subsets
from sidt.report.tables import table

HERE = Path(__file__).parent
SCORED = ((64, 300, 10), (500, 3_600, 80), (5_000, 36_000, 80))  # images, true boxes, classes; the last as COCO val2017


def made_up(file: Path, images: int, boxes: int) -> None:
    """Write a file of annotations as COCO has them, the same each time."""
    random = np.random.default_rng(0)
    of = random.integers(0, images, boxes).tolist()
    corners = random.uniform(0, 400, (boxes, 2)).round(2).tolist()
    sizes = random.uniform(4, 80, (boxes, 2)).round(2).tolist()
    classes = random.integers(1, 81, boxes).tolist()
    annotations = [
        {
            "id": i + 1,
            "image_id": of[i],
            "category_id": classes[i],
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h, x + w / 2, y + h, x, y + h / 2] * 3],
        }
        for i, ((x, y), (w, h)) in enumerate(zip(corners, sizes, strict=True))
    ]
    shown = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in range(images)]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    with file.open("w") as out:
        json.dump({"images": shown, "annotations": annotations, "categories": categories}, out)


def plainly(file: Path, folder: Path) -> None:
    with file.open() as text:
        json.load(text)


def read(file: Path, folder: Path) -> None:
    read_annotations(file)


def check(file: Path, folder: Path) -> None:
    check_annotations(file)


def check_masks(file: Path, folder: Path) -> None:
    check_annotations(file, masks=True)


def split(file: Path, folder: Path) -> None:
    write_subsets(file, folder, held=0.02, seed=0)


WORK: dict[str, Callable[[Path, Path], None]] = {
    "json.load alone": plainly,
    "read": read,
    "read and check": check,
    "read and check, with masks": check_masks,
    "read, check and split": split,
}


def measured(name: str, file: Path, folder: Path) -> tuple[float, float, float]:
    """Seconds of the wall's clock and of the processor, and the peak of memory in GiB, in this process."""
    wall, processor = time.perf_counter(), time.process_time()
    WORK[name](file, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return time.perf_counter() - wall, time.process_time() - processor, peak


def to_score(images: int, boxes: int, classes: int) -> tuple[COCO, COCO]:
    """True boxes and detections, the same each time."""
    random = np.random.default_rng(0)
    of, kinds = random.integers(0, images, boxes), random.integers(1, classes + 1, boxes)
    true = np.concatenate((random.uniform(0, 400, (boxes, 2)), random.uniform(4, 120, (boxes, 2))), axis=1)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(images)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": int(of[i]),
                "category_id": int(kinds[i]),
                "bbox": true[i].tolist(),
                "area": float(true[i, 2:].prod()),
                "iscrowd": 0,
            }
            for i in range(boxes)
        ],
    }
    near = np.repeat(np.arange(boxes), 3)
    found = true[near] + random.normal(0, 0.1, (len(near), 4)) * np.tile(true[near, 2:], 2)
    others = np.arange(images).repeat(np.maximum(0, 100 - 3 * np.bincount(of, minlength=images)))
    strange = np.concatenate(
        (random.uniform(0, 400, (len(others), 2)), random.uniform(4, 120, (len(others), 2))), axis=1
    )
    all_of = np.concatenate((of[near], others))
    all_kinds = np.concatenate((kinds[near], random.integers(1, classes + 1, len(others))))
    all_boxes = np.concatenate((found, strange))
    all_boxes[:, 2:] = np.maximum(all_boxes[:, 2:], 1)
    scores = np.concatenate((random.uniform(0, 1, len(near)), random.uniform(0, 0.5, len(others))))
    entries = [
        {"image_id": i, "category_id": c, "bbox": b, "score": s}
        for i, c, b, s in zip(all_of.tolist(), all_kinds.tolist(), all_boxes.tolist(), scores.tolist(), strict=True)
    ]
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        return truth, truth.loadRes(entries)


def precision_by(scorer: Any, truth: COCO, detected: COCO) -> tuple[float, Any]:
    """Processor seconds, and the precision at every threshold, recall and class."""
    begin = time.process_time()
    with redirect_stdout(io.StringIO()):
        evaluation = scorer(truth, detected, "bbox")
        settings = evaluation.params
        settings.maxDets, settings.areaRng, settings.areaRngLbl = [100], settings.areaRng[:1], settings.areaRngLbl[:1]
        evaluation.evaluate()
        evaluation.accumulate()
    return time.process_time() - begin, np.asarray(evaluation.eval["precision"])


def scored(rounds: int) -> list[list[Any]]:
    """A row for each set of images: seconds by both scorers, in turn, and how far apart what they give is."""
    rows = []
    for images, boxes, classes in SCORED:
        pair = to_score(images, boxes, classes)
        times: list[list[float]] = [[], []]
        apart = 0.0
        for _ in range(rounds):
            (slow, theirs), (fast, ours) = (precision_by(by, *pair) for by in (COCOeval, COCOeval_faster))
            times[0].append(slow)
            times[1].append(fast)
            apart = max(apart, float(np.abs(theirs - ours).max()))
        row = [f"{images:,}", f"{boxes:,}", classes, *(f"{np.median(t):.2f}" for t in times), f"{apart:.1e}"]
        click.echo("  ".join(map(str, row)), err=True)
        rows.append(row)
    return rows


@click.command()
@click.option("--images", default=118_000, show_default=True)
@click.option("--boxes", default=860_000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "coco_size", show_default=True)
def main(images: int, boxes: int, rounds: int, out: Path) -> None:
    """Measure each piece of work in turn, several times; the medians are the results."""
    context = multiprocessing.get_context("spawn")
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "instances.json"
        made_up(file, images, boxes)
        size = file.stat().st_size / 2**20
        for work in WORK:
            found = []
            for _ in range(rounds):
                with context.Pool(1) as pool:
                    found.append(pool.apply(measured, (work, file, folder / "subsets")))
            wall, processor, peak = np.median(np.array(found), axis=0).tolist()
            spread = max(f[1] for f in found) - min(f[1] for f in found)
            rows.append([work, f"{wall:.1f}", f"{processor:.1f}", f"{spread:.1f}", f"{peak:.2f}"])
            click.echo("  ".join(rows[-1]), err=True)
    scores = scored(rounds)
    text = "\n".join(
        [
            f"{images:,} images, {boxes:,} boxes with polygons, {size:.0f} MiB; medians of {rounds} rounds, each in a",
            "process of its own. The peak of memory counts Python and its libraries.",
            "",
            table(["", "s", "processor s", "largest - smallest", "peak GiB"], rows, "md"),
            "",
            "Scoring 100 boxes an image, as a search does, for all areas at once; processor seconds, and the largest",
            "difference of a precision at any threshold, recall and class.",
            "",
            table(["images", "true boxes", "classes", "pycocotools", "faster-coco-eval", "difference"], scores, "md"),
        ]
    )
    write_results(out, "What data of COCO's size costs", environment(), text, {"files": rows, "scores": scores})


if __name__ == "__main__":
    main()
