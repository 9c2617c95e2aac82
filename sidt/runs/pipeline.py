"""The steps of a run, each from files to files in a run folder, each re-runnable.

::

    train -> dense/            score -> base/ (with moments.safetensors), scores.safetensors
    search -> study.db, search/
    slice -> sliced/           finetune -> config.json, plan.json, model.safetensors (the result, for sidt.load)
    evaluate -> evaluation.json, answers.json        report -> report.md, kept.png, search.png, report.html

base/ is the dense model in the basis that scores and plans are of (see :func:`sidt.align`); what it computes is the
same. With ``steps`` it is a slice of that, which the last step starts from; plans on disk are of the dense model. What
its layers read is measured once, by score, for the repair of every slice. No step takes what was made of an input that
is no longer there (:mod:`sidt.runs.provenance`).
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sidt.allocation.curve import nearest
from sidt.allocation.knobs import plan_at
from sidt.allocation.steps import Slicer, before_last
from sidt.allocation.storage import check_storage
from sidt.allocation.study import Gain, gain_on
from sidt.allocation.timing import latencies_for
from sidt.cost.budget import Budget
from sidt.cost.complexity import report
from sidt.cost.latency import LayerLatencies
from sidt.data.loading import Splits
from sidt.data.preparation import PREPARATION, preparation_of
from sidt.errors import InputError
from sidt.export.checkpoint import load, save
from sidt.files import read_json, write_json
from sidt.importance.scores import Importance, load_importance
from sidt.runs import outcome, provenance
from sidt.runs.base import (
    MOMENTS,
    STEPS,
    latency_folder,
    moments_of,
    on_base,
    on_dense,
    origin_of,
    rules_of,
    scored,
    slicer_of,
    steps_of,
)
from sidt.runs.folder import CHAIN, PLAN, SEARCH, Run, base_model, dense_model, existing
from sidt.runs.images import data_of, held_out_images, sample
from sidt.runs.models import build, has_weights, space_of
from sidt.runs.quality import (
    gives_features,
    is_blind,
    judged_by,
    objective_of,
    says_of,
)
from sidt.runs.searching import answer, help_to_answer, layers_of, question_of
from sidt.runs.workers import helped
from sidt.space.plan import DimensionPlan
from sidt.surgery.compensation import refit_width
from sidt.surgery.heads import with_classes
from sidt.surgery.slicing import slice_model
from sidt.training.batches import make_loader
from sidt.training.digest import weights_digest
from sidt.training.distillation import TeacherConfig, distillation_loss
from sidt.training.evaluation import check_classes
from sidt.training.loop import Loss, TrainConfig, fit

_WIDTH_IMAGES = 192  # two passes over them for each layer that lost width


# --- steps --------------------------------------------------------------------------------------------------------


def train(run: Run) -> str:
    """Train the dense model, or take it with the weights it comes with."""
    config, data = run.config, data_of(run.config.data)
    torch.manual_seed(config.seed)
    model = build(config.model)
    space_of(config, model)  # a model without a space, or for other images, is said now, not after training
    model = _of_classes(model, data)
    if config.train is not None:
        if gives_features(model) or not data.classes:
            raise InputError(
                "the dense model cannot be trained: "
                + ("it has no head" if gives_features(model) else "the data have no labels")
                + "; leave out train, and give it weights"
            )
        _fit(run, model, data, config.train, "train")
    elif not has_weights(config.model):
        raise InputError(
            "the model has no weights: set train, model.checkpoint, or model.pretrained=true in the config"
        )
    _keep_preparation(run, model)
    save(model.cpu(), run.folder / "dense")
    good = "" if is_blind(run, model) else f": {says_of(run, model, data.holdout)} on held-out images"
    return f"dense model{good} -> {run.folder / 'dense'}; {preparation_of(run.config.data)}"


def _of_classes(model: nn.Module, data: Splits) -> nn.Module:
    """The model with a head for the classes that were chosen, if some were and it has one for all."""
    count = getattr(model, "num_classes", None)
    if data.rows is not None and count == len(data.known):
        model = with_classes(model, data.rows)
    elif data.classes:
        check_classes(model, len(data.classes))
    return model


def _keep_preparation(run: Run, model: Any) -> None:
    """Note in the model how its images are prepared; checkpoints keep it."""
    says = preparation_of(run.config.data)
    own = {key: getattr(says, key) for key in PREPARATION}
    model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **own}


def score(run: Run, say: Callable[[str], None] = print) -> str:
    """Align the dense model, if it is to be repaired, and score every unit of it; with steps, slice it on the way."""
    begin, budget, steps = time.perf_counter(), run.config.budget.value(), steps_of(run.config)
    made_of = provenance.inputs(run.folder, CHAIN, "score")

    def prepare(model: nn.Module) -> tuple[nn.Module, Importance, Slicer]:
        base, scores, moments = scored(run, model)
        return base, scores, slicer_of(base, moments)

    def timed(base: nn.Module, scores: Importance, limits: Budget) -> LayerLatencies | None:
        return latencies_for(latency_folder(run, base), base.to(run.device), scores, limits, rules_of(run.config), say)

    if steps > 1:
        say(f"score: {steps} steps, each with images, scores and a slice of its own")
    model, limits = before_last(dense_model(run), budget, steps, prepare, rules=rules_of(run.config), timed=timed)
    model, found, moments = scored(run, model)
    if moments is not None:
        moments.save(run.folder / MOMENTS, origin_of(run, model))
    if steps > 1:  # before the base: of any base, what is left of the budget is the same
        write_json(run.folder / STEPS, {"steps": steps, "budget": str(budget), "left": asdict(limits)})
    found.save(run.folder / "scores.safetensors")
    save(model.cpu(), run.folder / "base")
    if steps == 1:
        (run.folder / STEPS).unlink(missing_ok=True)
    provenance.record(run.folder, CHAIN, "score", made_of)
    after = f" in {steps} steps" if steps > 1 else ""
    return (
        f"scores by {run.config.score.method}{after} in {time.perf_counter() - begin:.0f} s -> "
        f"{run.folder / 'scores.safetensors'}"
    )


def search(run: Run, say: Callable[[str], None]) -> str:
    """Search the plan within the budget."""
    check_storage(run.config.search.storage)
    made_of = provenance.inputs(run.folder, CHAIN, "search")
    config = run.config.search
    timed = run.config.budget.value().latency is not None
    with helped(partial(help_to_answer, run), config.workers, at_once=not timed) as begin_all:
        asked = question_of(run)
        objective, fresh = objective_of(run, asked.held_out), objective_of(run, data_of(run.config.data).fresh)
        begin = time.perf_counter()
        dense = float(np.concatenate(list(objective(dense_model(run)))).mean())
        judge = judged_by(run, dense_model(run))
        once = time.perf_counter() - begin
        limit = "" if config.timeout is None else f", {config.timeout:.0f} s at most"
        all_of_it = once * config.trials / (config.jobs * config.workers)
        cost = f"about {once:.1f} s each or less, {all_of_it:.0f} s in all{limit}"
        count = len(asked.held_out)  # type: ignore[arg-type]
        say(f"search: {config.trials} trials of {count} held-out images, {cost}; Ctrl-C keeps what is finished")
        latencies = layers_of(run, asked, say)
        begin_all()
        result = answer(run, asked, latencies)
    if config.workers > 1:  # what the others found last
        result = answer(run, asked, latencies)
    finished = [t for t in result.study.get_trials() if t.state.name == "COMPLETE"]  # stopped ones have values too
    whole = on_dense(asked.model, result.plan)
    whole.save(run.folder / PLAN)
    found = {
        "budget": str(run.config.budget.value()),
        "bounds": asked.budget.bounded[0],
        "dense": dense,
        "plain": result.plain_value,
        "best": result.value,
        "values": [t.values[0] for t in finished],
        "study": result.study.study_name,
        "pruned": result.pruned,
        "objective": judge,
        "multipliers": dict(result.multipliers),
        "gain": None,
        "front": [asdict(point) for point in result.front],
        "along": [(t.values[1], t.values[0], _is_plain(t.params)) for t in finished] if config.pareto else [],
    }
    write_json(run.folder / SEARCH, found)
    provenance.record(run.folder, CHAIN, "search", made_of)  # whatever happens now, the plan is there
    gain = gain_on(fresh, asked.slicer(result.plain), asked.slicer(result.plan))
    verdict = _says(gain, judge)
    write_json(run.folder / SEARCH, found | {"gain": asdict(gain) | {"says": verdict}})
    small, full = report(whole.space, whole.sizes), report(space_of(run.config, dense_model(run)))
    kept = f"{small.params / full.params:.2%} of the parameters, {small.macs / full.macs:.2%} of the MACs"
    if latencies is not None:
        of = "" if hasattr(asked.model, "sidt_plan") else f" of {latencies.dense_ms:.2f}"
        kept += f", {latencies.milliseconds(result.plan.sizes):.2f}{of} ms by the layer table"
    early = f", {result.pruned} of them stopped early" if result.pruned else ""
    ended = f"{len(finished) + result.pruned} trials{early}"
    return f"plan with {kept} after {ended}; {verdict} -> {run.folder / PLAN}"


def _is_plain(params: dict[str, float]) -> bool:
    """Whether a trial of a curve is the plain ranking at its budget."""
    return not any(value for knob, value in params.items() if knob != "share")


def slice_(run: Run, at: float | None = None, say: Callable[[str], None] = print) -> str:
    """Slice the dense model by the plan, and repair what lost inputs.

    Args:
        run: the run.
        at: the part of the dense model's cost that may stay: another point of the curve that a Pareto search found
            than that of the budget; it becomes the run's plan.
        say: told what is measured for it, where the curve is of milliseconds.
    """
    made_of = provenance.inputs(run.folder, CHAIN, "slice")
    model = base_model(run)
    if at is not None:
        _take_point(run, model, at, say)
        made_of = provenance.inputs(run.folder, CHAIN, "slice")
    plan = on_base(run, model)
    small = slicer_of(model, moments_of(run, model))(plan)
    if run.config.repair:
        images = sample(data_of(run.config.data).calibration, _WIDTH_IMAGES)
        small = refit_width(model, small, plan, make_loader(images, 64))
    small = small.cpu()
    save(small, run.folder / "sliced")
    provenance.record(run.folder, CHAIN, "slice", made_of)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense_model(run), small))
    return (
        f"sliced {before:,} to {after:,} parameters{_repair_says(run, model, plan, small)} -> {run.folder / 'sliced'}"
    )


def _repair_says(run: Run, base: nn.Module, plan: DimensionPlan, small: nn.Module) -> str:
    """What the repair did to the slice, on held-out images."""
    if not run.config.repair:
        return ""
    images = held_out_images(run)
    cut, repaired = (says_of(run, m, images) for m in (slice_model(base, plan), small))
    return f"; on held-out images {cut} as it was cut, {repaired} repaired"


def _take_point(run: Run, model: nn.Module, at: float, say: Callable[[str], None]) -> None:
    """Make a point of the curve the run's plan."""
    found = read_json(existing(run, SEARCH, "search --pareto"))
    front = outcome.curve_of(run, found)
    if not front:
        raise InputError(f"{run.folder} has no curve to take {at} from; run `sidt search {run.folder} --pareto` first")
    least = min(point.share for point in front)
    if not least <= at <= 1:
        raise InputError(f"--at {at} is not on the curve of {run.folder}; give a part from {least:.3g} to 1")
    scores = load_importance(existing(run, "scores.safetensors", "score"), space_of(run.config, model))
    rules = rules_of(run.config)
    budget = Budget(**{found["bounds"]: float(at)})
    latencies = latencies_for(latency_folder(run, model), model.to(run.device), scores, budget, rules, say)
    plan_at(scores, budget, nearest(front, at).knobs, rules=rules, latencies=latencies).save(run.folder / PLAN)
    write_json(run.folder / SEARCH, {**found, "at": at})
    provenance.record(run.folder, CHAIN, "search", provenance.inputs(run.folder, CHAIN, "search"))


def finetune(run: Run) -> str:
    """Train the sliced model further; the result is the run folder's own checkpoint."""
    made_of = provenance.inputs(run.folder, CHAIN, "finetune")
    model, config, loss = load(existing(run, "sliced/config.json", "slice").parent), run.config, None
    data = data_of(config.data)
    dense = dense_model(run)
    if is_blind(run, dense):  # the dense model is all there is to learn from
        teacher = (config.teacher or TeacherConfig()).model_dump() | {"labels": 0.0}
        loss = distillation_loss(dense, model, **teacher | ({"logits": 0.0} if gives_features(dense) else {}))
    elif config.teacher is not None:
        options = config.teacher.model_dump()
        loss = distillation_loss(dense, model, smoothing=config.finetune.smoothing, **options)
    _fit(run, model, data, config.finetune, "finetune", loss)
    save(model.cpu(), run.folder)
    provenance.record(run.folder, CHAIN, "finetune", made_of)
    return f"fine-tuned: {says_of(run, model, data.holdout)} on held-out images -> {run.folder}"


def run_all(run: Run, say: Callable[[str], None]) -> None:
    """All steps in order. Training and search go on from where they were stopped."""
    say(train(run))
    say(score(run, say))
    say(search(run, say))
    for step in (slice_, finetune, outcome.evaluate, outcome.write_report):
        say(step(run))


# --- what the steps share -----------------------------------------------------------------------------------------


def _says(gain: Gain, objective: str) -> str:
    """Whether the search paid, in one sentence."""
    if objective == "top-1":
        return str(gain)
    return gain.sentence("{:+.4f}", "{:.4f}", f"{objective}, {gain.samples} fresh samples")


def _fit(run: Run, model: nn.Module, data: Splits, config: TrainConfig, step: str, loss: Loss | None = None) -> None:
    """Train with a resumable state that belongs to this config, this loss and these starting weights."""
    if config.device == "auto":
        config = config.model_copy(update={"device": run.device})
    digest = hashlib.sha256((config.model_dump_json() + run.config.data.model_dump_json()).encode())
    if loss is not None:
        digest.update(loss.__qualname__.encode())
    digest.update(weights_digest(model).encode())
    states = run.folder / "states"
    own = states / f"{step}-{digest.hexdigest()[:12]}"
    for old in states.glob(f"{step}-*"):
        if old != own:
            shutil.rmtree(old)
    val = data.holdout if getattr(model, "num_classes", None) == len(data.classes) else None
    history = fit(model, data.train, config, val=val, folder=own, loss=loss, label=step)
    write_json(run.folder / f"{step}.json", history)
