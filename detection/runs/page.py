"""The page of a detection run: what is gathered for it from the run folder."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.ops import box_iou

from sidt.cost.complexity import Row
from sidt.detection.data.sources import source_of
from sidt.detection.detectors.checkpoints import load_detector
from sidt.detection.detectors.space import detector_space, not_counted
from sidt.detection.runs.folder import (
    CHAIN,
    EVALUATION,
    PLAN,
    SEARCH,
    DetectionRun,
    detectors,
    existing,
    input_size,
)
from sidt.errors import InputError
from sidt.files import read_json
from sidt.report.parts import (
    Box,
    Number,
    Part,
    compared,
    complexity,
    cost_tile,
    details,
    facts,
    kept,
    made,
    picture,
    pictures,
    section,
    table,
    tile,
    without_passwords,
    write,
)
from sidt.runs import provenance
from sidt.runs.answers import in_turn
from sidt.runs.page import search_section
from sidt.space.plan import has_channels, load_plan
from sidt.training.devices import resolve_device

_MOST = 6  # images shown
_SCORE, _IOU = 0.3, 0.5  # boxes below are not shown; a box that overlaps an object of its class so much is right
_PACKAGES = ("sidt", "torch", "onedl-mmdetection", "onedl-mmengine", "optuna", "plotly")


class _Found(NamedTuple):
    """Boxes of one image, x y w h, their categories and scores; the best first."""

    boxes: list[list[float]]
    categories: list[int]
    scores: list[float]


def write_page(run: DetectionRun) -> Path:
    """Write ``report.html`` from what search and evaluate left.

    Raises:
        InputError: one of them has not been done, or the detectors are of two searches.
    """
    provenance.inputs(run.folder, CHAIN, "report")
    for name, step in ((PLAN, "search"), (SEARCH, "search"), (EVALUATION, "evaluate")):
        if not (run.folder / name).is_file():
            raise InputError(f"{run.folder / name} is not there; run `sidt detect {step} {run.folder}` first")
    found, rows = read_json(run.folder / SEARCH), read_json(run.folder / EVALUATION)
    detector, config = load_detector(existing(run, "dense", "train CONFIG"))
    space = detector_space(detector, config.model, input_size(run), outside=has_channels(run.folder / PLAN))
    plan = load_plan(run.folder / PLAN, space)
    before, final = rows["dense"], list(rows)[-1]
    after = rows[final]
    storage = run.settings.storage or f"sqlite:///{(run.folder / 'study.db').resolve()}"
    shape = " x ".join(map(str, before["input_size"]))
    counted = (
        f"MACs for one {shape} image, a multiply-add counted as 1, attention included. "
        f"Not counted: {not_counted(detector, space)}."
    )
    sections = [
        _asked(run, type(detector).__name__, found),
        section("Accuracy and cost", "", *_scores(rows), _costs(rows)),
        section("What stays", f"The sizes of the backbone, a {space.model}, of the dense ones.", kept(plan)),
        search_section(storage, found, found["objective"], ""),
        _side_by_side(run, list(rows)),
        section("Complexity", "", complexity(_parts(before), _parts(after), counted)),
        section("How this page was made", "", made(_PACKAGES, str(resolve_device(run.settings.device)))),
    ]
    tiles = [
        cost_tile("Parameters", before["params"], after["params"]),
        cost_tile("MACs", sum(before["macs"].values()), sum(after["macs"].values())),
        _ap_tile(before, after),
    ]
    if "latency_ms" in before and "latency_ms" in after:
        tiles.append(cost_tile("Latency of one image", before["latency_ms"], after["latency_ms"], "{:.2f} ms"))
    backbone = after["params_by_part"]["backbone"] / before["params_by_part"]["backbone"]
    lead = f"The backbone of the {final} detector has {backbone:.1%} of the parameters of the dense one's"
    old, new = before["bbox"]["AP"], after["bbox"]["AP"]
    lead += "." if old is None or new is None else f"; its box AP is {compared(old, new)}."
    path = run.folder / "report.html"
    write(path, f"{type(detector).__name__} with {space.model}, budget {found['budget']}", lead, tiles, sections)
    return path


def _asked(run: DetectionRun, detector: str, found: Mapping[str, Any]) -> dict[str, Any]:
    settings, source = run.settings, source_of(run.config, "test_dataloader")
    kinds = f", of {', '.join(settings.searched)}" if settings.searched else ""
    rows = [
        ("Detector", detector),
        ("Test data", f"{source.annotations}, {len(source.classes):,} classes"),
        ("Budget", f"{found['budget']} of the {found['on']}"),
        ("Importance", f"{settings.score}, on {settings.score_images:,} images"),
        ("Repair", "layers that lost inputs are refitted" if settings.repair else "none"),
        ("Search", f"{settings.trials:,} trials{kinds}"),
    ]
    return section(
        "What was asked", "", facts(rows), details("The whole config", without_passwords(run.config.pretty_text))
    )


def _scores(rows: Mapping[str, Any]) -> list[Part]:
    """A table of AP for boxes, and one for masks; then one of the classes, where they were asked for."""
    kinds = [kind for kind in ("bbox", "segm") if kind in next(iter(rows.values()))]
    parts = []
    for kind in kinds:
        what = {"bbox": "boxes", "segm": "masks"}[kind]
        names = [name for name in rows["dense"][kind] if name != "classes"]
        cells = [[model, *(_ap(row[kind][name]) for name in names)] for model, row in rows.items()]
        caption = f"COCO's average precision of {what}, in percent; a dash where there is no object of that size."
        parts.append(table(caption, ["detector", *names], cells))
        classes = [row[kind].get("classes", {}) for row in rows.values()]
        if all(classes):
            cells = [[name, *(_ap(of[name]) for of in classes)] for name in classes[0]]
            parts.append(table(f"AP of {what} by class.", ["class", *rows], cells, sortable=True))
    return parts


def _ap(value: float | None) -> Number | None:
    return None if value is None else Number(value, f"{100 * value:.2f}")


def _ap_tile(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    old, new = before["bbox"]["AP"], after["bbox"]["AP"]
    if old is None or new is None:
        return tile("Box AP", "-", "-", "no object in the test data")
    return tile("Box AP", f"{100 * old:.2f}", f"{100 * new:.2f}", f"{100 * (new - old):+.2f} points", new)


def _costs(rows: Mapping[str, Any]) -> Part:
    timed = all("latency_ms" in row for row in rows.values())
    cells = []
    for name, row in rows.items():
        time = [Number(row["latency_ms"], f"{row['latency_ms']:.2f}"), row["device"]] if timed else []
        cells.append([name, row["params"], sum(row["macs"].values()), *time])
    headers = ["detector", "params", "MACs", *(["latency, ms", "on"] if timed else [])]
    return table(
        "Costs of the whole detector" + ("; latency is the median for one image." if timed else "."), headers, cells
    )


def _parts(row: Mapping[str, Any]) -> dict[str, Row]:
    return {name: Row(name, params, row["macs"].get(name, 0)) for name, params in row["params_by_part"].items()}


# --- boxes --------------------------------------------------------------------------------------------------------


def _side_by_side(run: DetectionRun, evaluated: list[str]) -> dict[str, Any]:
    """The objects, and what the dense and the final detector find, on the test images where they differ most."""
    final, title = evaluated[-1], "Boxes side by side"
    source, folders = source_of(run.config, "test_dataloader"), detectors(run)
    try:
        data = read_json(source.annotations)
        names = {one["id"]: one["name"] for one in data["categories"] if one["name"] in source.classes}
        objects = [one for one in data["annotations"] if one["category_id"] in names and not one.get("iscrowd")]
        truth = _by_image([one | {"score": 1.0} for one in objects])
        found = {}
        for model in dict.fromkeys(("dense", final)):
            path = folders[model] / "evaluation" / "results.bbox.json"
            found[model] = _by_image([one for one in read_json(path) if one["score"] >= _SCORE])
        right = {
            model: {image: _right(of[image], truth[image]) for image in truth.keys() | of.keys()}
            for model, of in found.items()
        }
        items = []
        counts = {
            one["id"]: sum(right[final].get(one["id"], ())) - sum(right["dense"].get(one["id"], ()))
            for one in data["images"]
        }
        more, fewer = sum(count > 0 for count in counts.values()), sum(count < 0 for count in counts.values())
        ordered = sorted(counts, key=lambda image: counts[image])
        chosen = in_turn([i for i in ordered if counts[i] < 0], [i for i in ordered[::-1] if counts[i] > 0], _MOST)
        chosen += [i for i in ordered if i not in chosen][: _MOST - len(chosen)]
        files = {one["id"]: one["file_name"] for one in data["images"]}
        for image in chosen:
            pixels = _read(source.images / files[image])
            columns: list[tuple[str, _Found, list[bool] | None]] = [("objects", truth[image], None)]
            columns += [(model, of[image], right[model].get(image, [])) for model, of in found.items()]
            items += [_picture(pixels, files[image], *column, names) for column in columns]
    except InputError as missing:
        return section(title, f"Not drawn: {missing}.")
    says = (
        f"Of {len(counts):,} test images the {final} detector finds more objects than the dense one in {more:,}, fewer "
        f"in {fewer:,}. An object is found by a box of its class that scores at least {_SCORE} and overlaps it by "
        f"{_IOU}."
    )
    caption = (
        f"Left the objects, then the dense and the {final} detector, where they differ most: a whole line is a box "
        "that is right, a broken one is not."
    )
    return section(title, says, pictures(caption, items, compared=True))


def _by_image(objects: list[dict[str, Any]]) -> defaultdict[int, _Found]:
    """Boxes by image, those of the highest score first."""
    found: defaultdict[int, _Found] = defaultdict(lambda: _Found([], [], []))
    for one in sorted(objects, key=lambda one: -one["score"]):
        of = found[one["image_id"]]
        of.boxes.append(one["bbox"])
        of.categories.append(one["category_id"])
        of.scores.append(one["score"])
    return found


def _right(found: _Found, truth: _Found) -> list[bool]:
    """Which boxes find an object of their class that no better box has found."""
    if not found.boxes or not truth.boxes:
        return [False] * len(found.boxes)
    overlap = box_iou(torch.tensor(found.boxes), torch.tensor(truth.boxes), fmt="xywh")
    same = torch.tensor(found.categories)[:, None] == torch.tensor(truth.categories)
    overlap, right = overlap * same, []
    for row in overlap:
        value, which = row.max(0)
        right.append(bool(value >= _IOU))
        if right[-1]:
            overlap[:, which] = 0
    return right


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def _picture(
    pixels: Image.Image, file: str, title: str, found: _Found, right: list[bool] | None, names: Mapping[int, str]
) -> Part:
    """One image with the boxes of one detector, or with its objects."""
    boxes = []
    for i, (box, category, score) in enumerate(zip(found.boxes, found.categories, found.scores, strict=True)):
        x, y, width, height = box
        how = "truth" if right is None else "right" if right[i] else "wrong"
        text = names.get(category, str(category)) + ("" if right is None else f" {score:.2f}")
        boxes.append(Box(x, y, width, height, text, how))
    count = f"{len(boxes)}" if right is None else f"{sum(right)} right, {len(boxes) - sum(right)} wrong"
    inside = ", ".join(box.text for box in boxes) or "no box"
    return picture(pixels, f"{file}, {title}: {inside}", [(title, count, "")], boxes)
