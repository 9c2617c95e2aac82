"""COCO average precision of detectors, at full precision.

MMDetection's CocoMetric rounds to three decimals, which is too coarse for a search. Here it only writes the
detections, and pycocotools scores them, with COCO's own settings: IoU 0.50 to 0.95, 100 detections an image. A search
scores by faster-coco-eval, which gives the same to the last bits in a seventh of the time.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import torch
from faster_coco_eval import COCOeval_faster
from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, collect_results, is_main_process
from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader

from sidt.detection.data.annotations import category_ids, read_annotations
from sidt.detection.data.images import naming_images
from sidt.detection.training.console import Progress, told_to
from sidt.errors import InputError
from sidt.files import read_json, replacing, saying_full
from sidt.report.tables import Format, table

IouType = Literal["bbox", "segm"]
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # pycocotools' ranges of areas, below and above 32 x 32 and 96 x 96 pixels
_AP50, _AP75 = 0, 5  # places in its IoU thresholds 0.50, 0.55 .. 0.95


class Scores(TypedDict, total=False):
    """COCO's average precisions, fractions; None where there is no object to find.

    Args:
        AP: over IoU thresholds 0.50 to 0.95.
        AP50: at IoU 0.50.
        AP75: at IoU 0.75.
        APs: of objects below 32 x 32 pixels.
        APm: of objects in between.
        APl: of objects above 96 x 96 pixels.
        classes: AP of each class by name, where it was asked for.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    APs: float | None
    APm: float | None
    APl: float | None
    classes: dict[str, float | None]


def score_file(
    annotations: Path,
    results: Path,
    iou_type: IouType,
    *,
    classes: Sequence[str] | None = None,
    image_ids: Iterable[int] | None = None,
    per_class: bool = False,
) -> Scores:
    """Score a COCO result file.

    Args:
        annotations: COCO instances file.
        results: COCO result file, as MMDetection writes it; it may be empty, which scores 0.
        iou_type: ``bbox`` for boxes, ``segm`` for masks.
        classes: the detector's classes, which are the ones that count; without them, all categories do.
        image_ids: the images that count; without them, all of ``annotations`` do.
        per_class: whether to give the AP of each class too.

    Raises:
        InputError: a file cannot be read, or the results are not of these annotations or of this type.
    """
    data, found = read_annotations(annotations), read_json(results)
    needed = {"image_id", "category_id", "score", "bbox" if iou_type == "bbox" else "segmentation"}
    if not isinstance(found, list) or not all(isinstance(one, dict) and needed <= one.keys() for one in found):
        raise InputError(
            f"{results} is no COCO result file for {iou_type}, a list of objects with {', '.join(sorted(needed))}; "
            "give the file that the test wrote"
        )
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        strange = {one[key] for one in found} - {entry["id"] for entry in data[part]}
        if strange:
            raise InputError(
                f"{results} has the {key} {min(strange, key=str)}, which is not in {annotations}; "
                "give the annotations that the detector was tested on"
            )
    ids = category_ids(annotations, data, classes)
    counted = _known(annotations, data, image_ids)
    truth = _indexed(data)
    precision = _precision(truth, _detected(truth, found, iou_type), iou_type, ids, counted)
    scores = Scores(
        AP=_mean(precision[..., _ALL]),
        AP50=_mean(precision[_AP50, ..., _ALL]),
        AP75=_mean(precision[_AP75, ..., _ALL]),
        APs=_mean(precision[..., _SMALL]),
        APm=_mean(precision[..., _MEDIUM]),
        APl=_mean(precision[..., _LARGE]),
    )
    if per_class:
        names = {category["id"]: category["name"] for category in data["categories"]}
        scores["classes"] = {names[i]: _mean(precision[:, :, k, _ALL]) for k, i in enumerate(sorted(ids))}
    return scores


def test(config: Config, folder: Path, *, per_class: bool = False) -> dict[str, Scores]:
    """Test a detector as its MMDetection config says, and score it at full precision.

    MMEngine's Runner builds the detector, loads ``config.load_from`` and runs it over ``test_dataloader``. The
    images of that loader are scored: all of the annotation file, or those that the config restricts it to.
    The detections are left in ``folder`` as ``results.bbox.json`` and ``results.segm.json``.

    Args:
        config: with ``test_dataloader``, ``test_cfg`` and a ``test_evaluator`` that is, or holds, a CocoMetric.
        folder: where the result files are written.
        per_class: whether to give the AP of each class too.

    Returns:
        Scores by metric, ``bbox`` and ``segm``, as the CocoMetric has them. In a distributed run the processes
        other than the first get nothing.

    Raises:
        InputError: the evaluator is not COCO's, its annotation file cannot be used, it is not that of the loader,
            or masks are to be scored and the detector has none.
    """
    metric, kinds = _coco_metric(config)
    annotations = Path(metric["ann_file"])
    data = read_annotations(annotations)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = TemporaryDirectory(dir=folder, prefix=".results-")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose a writable output folder") from None
    with partial:
        config = deepcopy(config)
        config.test_evaluator = metric | {"format_only": True, "outfile_prefix": f"{partial.name}/results"}
        with saying_full(Path(config.work_dir)), told_to(Path(config.work_dir)):
            runner = Runner.from_cfg(config)
            runner.register_hook(Progress("test"))
            dataset = runner.test_dataloader.dataset
            image_ids, classes = _known(annotations, data, _image_ids(dataset)), dataset.metainfo["classes"]
            category_ids(annotations, data, classes)  # before an hour of inference
            with naming_images(config, "test_dataloader"):
                runner.test()
        if not is_main_process():
            return {}
        scores: dict[str, Scores] = {}
        for kind in kinds:
            written, path = Path(partial.name, f"results.{kind}.json"), folder / f"results.{kind}.json"
            if not written.exists():
                raise InputError(
                    f"the test_evaluator asks for {kind}, and the detector gave no masks; use metric='bbox', or a "
                    "detector with masks"
                )
            with replacing(path) as temporary:
                written.replace(temporary)
            scores[kind] = score_file(
                annotations, path, kind, classes=classes, image_ids=image_ids, per_class=per_class
            )
    return scores


def average_precision(
    model: nn.Module,
    loader: DataLoader[Any],
    annotations: Path,
    classes: Sequence[str],
    *,
    folds: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Box AP of a detector on the images of a test loader: what a search maximises.

    The model runs once, in eval mode; its modules' training modes are restored.

    Args:
        model: an MMDetection detector, with its ``data_preprocessor``.
        loader: a loader built by MMEngine, with a test pipeline.
        annotations: COCO instances file of the loader's images.
        classes: the detector's classes, in its order.
        folds: groups of images that are scored apart. Every call with the same images and ``seed`` makes the same
            groups, so that two models can be compared pairwise. They have equally many images, and equally many
            with boxes, up to one.
        seed: of the groups.

    Returns:
        Fractions: one of all images, or with ``folds`` one of each group. The same in every process of a
        distributed run.

    Raises:
        InputError: the annotations cannot be used or are not of these images, or there are too few images with
            boxes for the groups.
    """
    data = read_annotations(annotations)
    labels = category_ids(annotations, data, classes)
    dataset: Any = loader.dataset
    image_ids = _known(annotations, data, _image_ids(dataset))
    groups = _groups(annotations, data, labels, image_ids, 1 if folds is None else folds, seed)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            found = [_detections(s, labels) for batch in loader for s in model.test_step(batch)]  # type: ignore[operator]
    finally:
        for module, mode in modes:
            module.training = mode
    found = collect_results(found, len(dataset))  # None in processes other than the first
    values: list[Any] = [None]
    if is_main_process():
        truth = _indexed(data)
        detected = _detected(truth, list(chain.from_iterable(found)), "bbox")
        by_group = (_precision(truth, detected, "bbox", labels, group, areas=1, by=COCOeval_faster) for group in groups)
        values = [[_mean(precision) for precision in by_group]]
    broadcast_object_list(values)
    return np.array(values[0])


def check_folds(annotations: Path, classes: Sequence[str], folds: int | None) -> None:
    """Check that :func:`average_precision` can score all images of an annotation file in so many groups.

    Raises:
        InputError: there are too few images with boxes of the classes.
    """
    data = read_annotations(annotations)
    labels = category_ids(annotations, data, classes)
    _groups(annotations, data, labels, _known(annotations, data, None), 1 if folds is None else folds, 0)


def results_table(rows: Mapping[str, Mapping[str, Any]], style: Format = "table") -> str:
    """Evaluated detectors as a table; AP in percent, as COCO's tables have it.

    Args:
        rows: by name, each with any of ``bbox`` and ``segm`` (Scores), ``params``, ``macs`` (of the whole, or of
            each part by name) and ``latency_ms``. There is a column for what any of them has.
        style: of the table.
    """
    columns: dict[str, list[Any]] = {"model": list(rows)}
    for kind, prefix in (("bbox", ""), ("segm", "mask ")):
        if any(kind in row for row in rows.values()):
            for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
                columns[prefix + name] = [_percent(row.get(kind, {}).get(name)) for row in rows.values()]
    if any("params" in row for row in rows.values()):
        columns["params"] = [row.get("params", "-") for row in rows.values()]
    if any("macs" in row for row in rows.values()):
        given = [row.get("macs", {}) for row in rows.values()]
        macs = [of if isinstance(of, Mapping) else {"": of} for of in given]
        for part in dict.fromkeys(part for row in macs for part in row):
            columns[f"{part} MACs".strip()] = [row.get(part, "-") for row in macs]
    if any("latency_ms" in row for row in rows.values()):
        columns["latency (ms)"] = [_hundredths(row.get("latency_ms")) for row in rows.values()]
    return table(list(columns), list(zip(*columns.values(), strict=True)), style)


# --- details ------------------------------------------------------------------------------------------------------


def _coco_metric(config: Config) -> tuple[dict[str, Any], list[IouType]]:
    """The one CocoMetric of a config's test_evaluator, and which of boxes and masks it scores."""
    absent = [key for key in ("test_dataloader", "test_cfg", "test_evaluator", "work_dir") if config.get(key) is None]
    if absent:
        raise InputError(f"the config has no {' and no '.join(absent)}; a test needs all of them")
    evaluators = config.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, list | tuple) else [evaluators]
    types = [one.get("type") if isinstance(one, Mapping) else type(one) for one in evaluators]
    coco = [(METRICS.get(t) if isinstance(t, str) else t) is CocoMetric for t in types]
    if sum(coco) != 1:
        seen = ", ".join(t if isinstance(t, str) else getattr(t, "__name__", repr(t)) for t in types)
        raise InputError(f"test_evaluator is {seen}; it must hold one CocoMetric, as a dict(type='CocoMetric', ...)")
    metric = dict(evaluators[coco.index(True)])
    asked = metric.get("metric", "bbox")
    kinds: list[IouType] = [
        kind for kind in get_args(IouType) if kind in ([asked] if isinstance(asked, str) else asked)
    ]
    if not kinds:
        raise InputError(f"the CocoMetric of test_evaluator has metric={asked!r}; AP needs 'bbox', 'segm' or both")
    if not metric.get("ann_file"):
        raise InputError("the CocoMetric of test_evaluator has no ann_file; give it the one of the test_dataloader")
    return metric, kinds


def _image_ids(dataset: Any) -> list[int]:
    """The images of one of MMEngine's data sets; no image is read."""
    return [dataset.get_data_info(place)["img_id"] for place in range(len(dataset))]


def _known(annotations: Path, data: dict[str, Any], image_ids: Iterable[int] | None) -> list[int]:
    """The images to score, in order; all of them for None."""
    there = {image["id"] for image in data["images"]}
    wanted = there if image_ids is None else set(image_ids)
    if not wanted:
        raise InputError(f"there is no image of {annotations} to score; give some")
    if strange := wanted - there:
        raise InputError(
            f"{len(strange)} of the {len(wanted)} images, the id {min(strange)} first, are not in {annotations}; "
            "give the data set and the evaluation one file"
        )
    return sorted(wanted)


def _groups(
    annotations: Path, data: dict[str, Any], labels: Sequence[int], image_ids: Sequence[int], folds: int, seed: int
) -> list[list[int]]:
    """Split images into random groups, those with and those without boxes evenly."""
    known, chosen = set(labels), set(image_ids)
    boxed = {a["image_id"] for a in data["annotations"] if a["category_id"] in known and not a["iscrowd"]} & chosen
    if not 1 <= folds <= len(boxed):
        raise InputError(
            f"cannot score {folds} groups of the {len(image_ids)} images of {annotations}: {len(boxed)} have boxes of "
            "the classes, and every group needs one; give fewer folds or more images"
        )
    order = [image_ids[place] for place in np.random.default_rng(seed).permutation(len(image_ids))]
    order.sort(key=lambda image_id: image_id not in boxed)
    return [order[group::folds] for group in range(folds)]


def _detections(sample: Any, labels: Sequence[int]) -> list[dict[str, Any]]:
    """The boxes found in one image, as entries of a COCO result file."""
    found = sample.pred_instances
    if len(found.labels) and int(found.labels.max()) >= len(labels):
        raise InputError(
            f"the detector finds the class number {int(found.labels.max())}, and there are {len(labels)} classes; "
            "set num_classes of its heads to the number of classes"
        )
    corners = found.bboxes.double().cpu()
    boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=1)
    return [
        {"image_id": sample.img_id, "category_id": labels[label], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
    ]


def _indexed(data: dict[str, Any]) -> COCO:
    """Annotations for pycocotools, numbered from 1: it takes a match with a box of id 0 for none."""
    truth = COCO()
    truth.dataset = data | {"annotations": [a | {"id": i} for i, a in enumerate(data["annotations"], start=1)]}
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _detected(truth: COCO, found: list[dict[str, Any]], iou_type: IouType) -> COCO:
    """Detections for pycocotools, beside their annotations."""
    # With boxes beside the masks, it would sort objects into small, medium and large by their boxes.
    unused = "segmentation" if iou_type == "bbox" else "bbox"
    found = [{key: value for key, value in one.items() if key != unused} for one in found]
    with redirect_stdout(io.StringIO()):
        if found:
            return truth.loadRes(found)
        empty = COCO()  # loadRes fails on an empty list
        empty.dataset = truth.dataset | {"annotations": []}
        empty.createIndex()
        return empty


def _precision(
    truth: COCO,
    detected: COCO,
    iou_type: IouType,
    ids: Sequence[int],
    image_ids: Sequence[int],
    *,
    areas: int = 4,
    by: Any = COCOeval,
) -> np.ndarray:
    """Precision: 10 IoU thresholds x 101 recalls x classes by increasing id x areas; -1 without such objects."""
    with redirect_stdout(io.StringIO()):
        evaluation = by(truth, detected, iou_type)
        settings = evaluation.params
        settings.catIds, settings.imgIds, settings.maxDets = list(ids), list(image_ids), [100]
        settings.areaRng, settings.areaRngLbl = settings.areaRng[:areas], settings.areaRngLbl[:areas]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"][..., 0])


def _mean(precision: np.ndarray) -> float | None:
    there = precision[precision > -1]
    return float(there.mean()) if there.size else None


def _percent(part: float | None) -> float | str:
    return "-" if part is None else round(100 * part, 1)


def _hundredths(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.2f}"
