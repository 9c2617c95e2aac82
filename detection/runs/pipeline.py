"""The steps of a detection run, each from files to files in a run folder, each re-runnable.

::

    train (or a checkpoint) -> dense/
    search -> base/ (the aligned detector and its moments), scores.safetensors, study.db, search/, sliced/
    finetune -> config.py, plan.json, model.safetensors (the result, for MMDetection)
    evaluate -> evaluation.json, and evaluation/ with its boxes in the folder of each detector
    report -> report.html                   data/ holds the annotations of the held-out images and of the rest

No step takes what was made of an input that is no longer there (:mod:`sidt.runs.provenance`).
"""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process

from sidt.allocation.storage import check_storage
from sidt.allocation.study import gain_on
from sidt.detection.data.images import naming_images
from sidt.detection.data.sources import check_classes, source_of, with_data
from sidt.detection.detectors.checkpoints import (
    WEIGHTS,
    load_detector,
    load_weights,
    save_detector,
    weights_in,
)
from sidt.detection.detectors.configs import build_detector
from sidt.detection.detectors.space import detector_space, parts, time_detector
from sidt.detection.runs.data import TEST, TRAIN, check_source, checked, split_data
from sidt.detection.runs.folder import (
    CHAIN,
    EVALUATION,
    PLAN,
    SEARCH,
    DetectionRun,
    detectors,
    existing,
    input_size,
    open_detector,
)
from sidt.detection.runs.objective import Say, says, shown
from sidt.detection.runs.pictures import draw_side_by_side
from sidt.detection.runs.searching import answer, help_to_answer, question_of
from sidt.detection.runs.settings import TeacherSettings
from sidt.detection.training.evaluation import results_table, test
from sidt.detection.training.loop import join, prepared, train
from sidt.detection.training.loss import detector_loss
from sidt.errors import InputError
from sidt.files import read_json, write_json
from sidt.report.tables import Format
from sidt.runs import provenance
from sidt.runs.workers import helped
from sidt.surgery.compensation import refit_width
from sidt.training.devices import resolve_device


def train_dense(run: DetectionRun, options: Mapping[str, Any] | None = None, *, launcher: str = "none") -> str:
    """Train the dense detector as its config says, without the held-out images; the options are of this training."""
    join(launcher)
    detector = build_detector(run.config)
    detector_space(detector, run.config.model, input_size(run))  # a backbone without a space is said now
    source = checked(run, detector, TRAIN)
    checked(run, detector, TEST)
    config = with_data(run.config, TRAIN, split_data(run, source)["rest"])
    config.merge_from_dict(dict(options or {}))
    weights = Path(config.load_from) if config.get("load_from") else None
    if weights is not None and not weights.is_file():
        raise InputError(f"load_from={config.load_from} is no file here; download it, or set load_from=None")
    last = train(config, weights, run.folder / "states", "train", launcher=launcher)
    if is_main_process():
        load_weights(detector, last)
        save_detector(detector, run.config, run.folder / "dense", source.classes)
    barrier()
    return f"dense detector -> {run.folder / 'dense'}"


def take_checkpoint(run: DetectionRun, checkpoint: Path, *, only_test: bool = False) -> str:
    """Take a trained detector as the dense one; with ``only_test``, without a look at the training data."""
    detector = build_detector(run.config)
    load_weights(detector, checkpoint)
    source = checked(run, detector, TEST if only_test else TRAIN)
    save_detector(detector, run.config, run.folder / "dense", source.classes)
    return f"dense detector, from {checkpoint} -> {run.folder / 'dense'}"


def search(run: DetectionRun, say: Say) -> str:
    """Score every unit by the detector's loss, search the plan within the budget, slice."""
    settings = run.settings
    if settings.budget is None:
        raise InputError("a search needs a budget: --budget.params 0.6 for 40 % fewer parameters of the backbone")
    check_storage(settings.storage)
    existing(run, "dense", "search CONFIG --checkpoint FILE` or `sidt detect train CONFIG")
    made_of = provenance.inputs(run.folder, CHAIN, "search")
    with helped(partial(help_to_answer, run), settings.workers, at_once=False) as begin_all:
        asked = question_of(run, say)
        fresh = asked.fresh()  # what is wrong with these images is said before hours of trials
        begin = time.perf_counter()
        dense_value = float(np.mean(asked.judge(asked.detector)))
        seconds = time.perf_counter() - begin
        value = f"{shown(settings, dense_value)} ({asked.judged_by})"
        say(f"dense: {value}; {settings.trials} trials, about {seconds:.0f} s each")
        begin_all()
        result = answer(run, asked)
    if settings.workers > 1:  # what the others found last
        result = answer(run, asked)
    result.plan.save(run.folder / PLAN)
    full, small = parts(asked.space), parts(asked.space, result.plan.sizes)
    values = [trial.values[0] for trial in result.study.trials if trial.state.name == "COMPLETE"]
    found = {
        "budget": str(settings.budget.value()),
        "on": settings.on,
        "objective": asked.judged_by,
        "dense": dense_value,
        "plain": result.plain_value,
        "best": result.value,
        "values": values,
        "pruned": result.pruned,
        "study": result.study.study_name,
        "gain": None,
        "parts": {
            n: {"dense": [r.params, r.macs], "sliced": [small[n].params, small[n].macs]} for n, r in full.items()
        },
        "settings": settings.model_dump(mode="json"),
    }
    write_json(run.folder / SEARCH, found)
    sliced = asked.slicer(result.plan)
    if settings.repair and "width" in (settings.kinds or ()):
        sliced = refit_width(asked.detector, sliced, result.plan, asked.images(1), forward=detector_loss)
    save_detector(sliced, asked.original, run.folder / "sliced", asked.source.classes)
    provenance.record(run.folder, CHAIN, "search", made_of)  # whatever happens now, plan and detector are there
    gain = gain_on(fresh, asked.slicer(result.plain), asked.slicer(result.plan))
    verdict = says(settings, gain)
    judged = {"plain": gain.plain, "found": gain.found, "error": gain.error, "says": verdict}
    write_json(run.folder / SEARCH, found | {"gain": judged})
    kept = [f"{getattr(small['backbone'], c) / getattr(full['backbone'], c):.2%}" for c in ("params", "macs")]
    trials = len(values) + result.pruned
    left = f"backbone with {kept[0]} of its parameters and {kept[1]} of its MACs after {trials} trials"
    return f"{left}; {verdict} -> {run.folder / 'sliced'}"


def finetune(
    run: DetectionRun, options: Mapping[str, Any] | None = None, *, launcher: str = "none", teacher: bool = False
) -> str:
    """Train the sliced detector further; the result is the run folder's own detector.

    The dense detector teaches it if ``teacher`` is given, or if the run's settings say how.
    """
    join(launcher)
    sliced = existing(run, "sliced", "search")
    made_of = provenance.inputs(run.folder, CHAIN, "finetune")
    changes = {**run.options, **run.settings.finetune, **(options or {})}
    detector, config = open_detector(DetectionRun(run.folder, run.config, run.settings, changes, run.data_root), sliced)
    source = checked(run, detector, TRAIN)
    config = with_data(config, TRAIN, split_data(run, source)["rest"])
    taught = run.settings.teacher or (TeacherSettings() if teacher else None)
    if taught is not None:
        dense = existing(run, "dense", "train CONFIG").resolve()
        hook = {"type": "TeacherHook", "folder": str(dense), **taught.model_dump()}
        config.custom_hooks = [*(config.get("custom_hooks") or []), hook]
    last = train(config, sliced / WEIGHTS, run.folder / "states", "finetune", launcher=launcher)
    if is_main_process():
        detector, original = load_detector(sliced)
        load_weights(detector, last)
        save_detector(detector, original, run.folder, source.classes)
        provenance.record(run.folder, CHAIN, "finetune", made_of)
    barrier()
    return f"fine-tuned detector -> {run.folder}"


def evaluate(
    run: DetectionRun, *, launcher: str = "none", per_class: bool = False, latency: bool = True, style: Format = "table"
) -> str:
    """COCO scores on the test data, parameters, multiply-adds and latency of the detectors that are there."""
    join(launcher)
    there = detectors(run)
    if not there:
        raise InputError(f"no detector in {run.folder}; run `sidt detect search` or `sidt detect train` first")
    made_of = provenance.inputs(run.folder, CHAIN, "evaluate")
    size, device, rows = input_size(run), run.settings.device, {}
    for name, folder in there.items():
        config = open_detector(run, folder)[1]
        rows[name] = evaluate_detector(
            folder, config, size, launcher=launcher, per_class=per_class, latency=latency, device=device
        )
    if not is_main_process():
        return ""
    write_json(run.folder / EVALUATION, rows)
    provenance.record(run.folder, CHAIN, "evaluate", made_of)
    text = results_table(rows, style)
    shape = "x".join(map(str, size))
    timed = f"; latency on {resolve_device(device)}" if latency else ""
    return text if style == "csv" else f"{text}\n\nMACs for one {shape} image{timed}."


def evaluate_detector(
    folder: Path,
    config: Config,
    input_size: tuple[int, int, int],
    *,
    launcher: str = "none",
    per_class: bool = False,
    latency: bool = True,
    device: str = "auto",
) -> dict[str, Any]:
    """COCO scores, costs and latency of one detector's folder.

    Args:
        folder: the detector's.
        config: says the test data and how it is scored; the model is the folder's own.
        input_size: channels, height, width of the image that costs are stated at.
        launcher: MMEngine's, for several processes.
        per_class: whether to give the AP of each class too.
        latency: whether to time the detector.
        device: where it is timed; MMEngine tests on a GPU if there is one.
    """
    detector, own = load_detector(folder)
    source = source_of(config, TEST)
    check_source(source)
    check_classes(detector, source.classes, config)
    config = prepared(config, folder / "evaluation", launcher)
    config.model = own.model  # MMEngine leaves weights of another size out, and only logs it
    config.load_from = str(weights_in(folder))
    row: dict[str, Any] = dict(test(config, folder / "evaluation", per_class=per_class))
    space = detector_space(detector, config.model, input_size)
    rows = parts(space)
    row |= {
        "params": sum(p.numel() for p in detector.parameters()),
        "macs": {name: part.macs for name, part in rows.items() if part.macs},
        "params_by_part": {name: part.params for name, part in rows.items()},
        "input_size": list(input_size),
    }
    if latency:
        place = resolve_device(device)
        row |= {"latency_ms": time_detector(detector.to(place), input_size), "device": str(place)}
    return row


def draw(run: DetectionRun, images: int) -> str:
    """Draw what each detector of the run finds in the first test images, side by side."""
    provenance.inputs(run.folder, CHAIN, "evaluate")
    opened = {name: open_detector(run, folder) for name, folder in detectors(run).items()}
    source = source_of(run.config, TEST)
    files = [source.images / image["file_name"] for image in read_json(source.annotations)["images"][:images]]
    with naming_images(run.config, TEST):
        draw_side_by_side(opened, files, source.classes, run.folder / "detections.png")
    return f"boxes in {len(files)} test images -> {run.folder / 'detections.png'}"
