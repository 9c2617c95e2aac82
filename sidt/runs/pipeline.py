"""The steps of a run, each from files to files in a run folder, each re-runnable.

::

    train -> dense/            score -> base/ (with moments.safetensors), scores.safetensors
    search -> study.db, search/
    slice -> sliced/           finetune -> config.json, plan.json, model.safetensors (the result, for sidt.load)
    evaluate -> evaluation.json, answers.json        report -> report.md, kept.png, search.png, report.html

base/ is the dense model in the basis that scores and plans are of (see :func:`sidt.align`); what it computes is the
same. With ``steps`` it is a slice of that, which the last step starts from; plans on disk are of the dense model. What
its layers read is measured once, by score, for the repair of every slice.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from sidt.allocation.curve import Point, nearest
from sidt.allocation.knobs import plan_at
from sidt.allocation.steps import Slicer, before_last
from sidt.allocation.study import Gain
from sidt.allocation.study import search as optuna_search
from sidt.allocation.timing import latencies_for
from sidt.cost.budget import Budget
from sidt.cost.complexity import measure, report, time_forward
from sidt.cost.latency import LayerLatencies
from sidt.errors import InputError
from sidt.export.checkpoint import load, save
from sidt.export.models import create_model
from sidt.export.weights import load_weights
from sidt.files import read_json, write_json, write_text
from sidt.importance.scores import Importance, load_importance
from sidt.runs import report as reporting
from sidt.runs.answers import Answers
from sidt.runs.base import (
    MOMENTS,
    STEPS,
    budget_left,
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
from sidt.runs.folder import PLAN, SEARCH, Run, base_model, check_one_plan, dense_model, existing, searched_plan
from sidt.runs.images import data_of, held_out_images, sample
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.compensation import refit_width
from sidt.surgery.slicing import slice_model
from sidt.training.batches import make_loader
from sidt.training.data import Splits
from sidt.training.distillation import distillation_loss
from sidt.training.evaluation import answers, check_classes, correct, log_likelihood, top1
from sidt.training.loop import Loss, TrainConfig, fit, weights_digest

_JUDGED_BY = {"top1": "top-1", "loss": "log-likelihood"}
_WIDTH_IMAGES = 192  # two passes over them for each layer that lost width
_PARTS = 8  # of the held-out images; after each a hopeless trial can be stopped


# --- steps --------------------------------------------------------------------------------------------------------


def train(run: Run) -> str:
    """Train the dense model, or take it with the weights it comes with."""
    config, data = run.config, data_of(run.config.data)
    torch.manual_seed(config.seed)
    model = create_model(config.model.name, config.model.args, pretrained=config.model.pretrained)
    space_for(model)  # a model without a space is said now, not after training
    if config.model.checkpoint is not None:
        load_weights(model, config.model.checkpoint)
    check_classes(model, len(data.classes))
    if config.train is not None:
        _fit(run, model, data, config.train, "train")
    elif not config.model.pretrained and config.model.checkpoint is None:
        raise InputError(
            "the model has no weights: set train, model.checkpoint, or model.pretrained=true in the config"
        )
    save(model.cpu(), run.folder / "dense", name=config.model.name, args=config.model.args)
    accuracy = reporting.percent(top1(model, data.holdout, device=run.device))
    return f"dense model: {accuracy} on held-out images -> {run.folder / 'dense'}"


def score(run: Run, say: Callable[[str], None] = print) -> str:
    """Align the dense model, if it is to be repaired, and score every unit of it; with steps, slice it on the way."""
    begin, budget, steps = time.perf_counter(), run.config.budget.value(), steps_of(run.config)

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
    save(model.cpu(), run.folder / "base", name=run.config.model.name, args=run.config.model.args)
    if steps == 1:
        (run.folder / STEPS).unlink(missing_ok=True)
    after = f" in {steps} steps" if steps > 1 else ""
    return (
        f"scores by {run.config.score.method}{after} in {time.perf_counter() - begin:.0f} s -> "
        f"{run.folder / 'scores.safetensors'}"
    )


def search(run: Run, say: Callable[[str], None]) -> str:
    """Search the plan within the budget."""
    model, config = base_model(run), run.config.search
    space = space_for(model)
    scores = load_importance(existing(run, "scores.safetensors", "score"), space)
    held_out, budget = held_out_images(run), budget_left(run)
    judge = correct if config.objective == "top1" else log_likelihood

    def objective(images: Dataset[Any]) -> Callable[[nn.Module], Iterator[Any]]:
        parts = [Subset(images, range(i, len(images), _PARTS)) for i in range(min(_PARTS, len(images)))]  # type: ignore[arg-type]
        return lambda small: (judge(small, part, device=run.device) for part in parts)

    slicer, begin = slicer_of(model, moments_of(run, model)), time.perf_counter()
    dense = float(np.concatenate(list(objective(held_out)(dense_model(run)))).mean())
    once = time.perf_counter() - begin
    limit = "" if config.timeout is None else f", {config.timeout:.0f} s at most"
    cost = f"about {once:.1f} s each or less, {once * config.trials / config.jobs:.0f} s in all{limit}"
    count = len(held_out)  # type: ignore[arg-type]
    say(f"search: {config.trials} trials of {count} held-out images, {cost}; Ctrl-C keeps what is finished")
    rules = rules_of(run.config)
    latencies = latencies_for(latency_folder(run, model), model.to(run.device), scores, budget, rules, say)
    result = optuna_search(
        model,
        scores,
        budget,
        objective(held_out),
        fresh=objective(data_of(run.config.data).fresh),
        trials=config.trials,
        timeout=config.timeout,
        seed=run.config.seed,
        sampler=config.sampler,
        rules=rules,
        latencies=latencies,
        slicer=slicer,
        warm=[read_json(existing(Run(w, run.config), SEARCH, "search"))["multipliers"] for w in config.warm],
        jobs=config.jobs,
        pareto=config.pareto,
        storage=config.storage or f"sqlite:///{run.folder / 'study.db'}",
        label=f"{run.config.data.model_dump_json()} {config.images} {config.objective} {run.config.repair}",
    )
    finished = [t for t in result.study.get_trials() if t.state.name == "COMPLETE"]  # stopped ones have values too
    whole = on_dense(model, result.plan)
    whole.save(run.folder / PLAN)
    gain = result.gain
    write_json(
        run.folder / SEARCH,
        {
            "budget": str(run.config.budget.value()),
            "bounds": budget.bounded[0],
            "dense": dense,
            "plain": result.plain_value,
            "best": result.value,
            "values": [t.values[0] for t in finished],
            "study": result.study.study_name,
            "pruned": result.pruned,
            "objective": config.objective,
            "multipliers": dict(result.multipliers),
            "gain": gain
            and {
                "plain": gain.plain,
                "found": gain.found,
                "error": gain.error,
                "samples": gain.samples,
                "says": _says(gain, config.objective),
            },
            "front": [asdict(point) for point in result.front],
            "along": [(t.values[1], t.values[0], _is_plain(t.params)) for t in finished] if config.pareto else [],
        },
    )
    small, full = report(whole.space, whole.sizes), report(whole.space)
    kept = f"{small.params / full.params:.2%} of the parameters, {small.macs / full.macs:.2%} of the MACs"
    if latencies is not None:
        of = "" if hasattr(model, "sidt_plan") else f" of {latencies.dense_ms:.2f}"
        kept += f", {latencies.milliseconds(result.plan.sizes):.2f}{of} ms by the layer table"
    early = f", {result.pruned} of them stopped early" if result.pruned else ""
    ended = f"{len(finished) + result.pruned} trials{early}"
    verdict = f"; {_says(gain, config.objective)}" if gain else ""
    return f"plan with {kept} after {ended}{verdict} -> {run.folder / PLAN}"


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
    model = base_model(run)
    if at is not None:
        _take_point(run, model, at, say)
    plan = on_base(run, model)
    small = slicer_of(model, moments_of(run, model))(plan)
    if run.config.repair:
        images = sample(data_of(run.config.data).calibration, _WIDTH_IMAGES)
        small = refit_width(model, small, plan, make_loader(images, 64))
    small = small.cpu()
    save(small, run.folder / "sliced", name=run.config.model.name, args=run.config.model.args)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense_model(run), small))
    return (
        f"sliced {before:,} to {after:,} parameters{_repair_says(run, model, plan, small)} -> {run.folder / 'sliced'}"
    )


def _repair_says(run: Run, base: nn.Module, plan: DimensionPlan, small: nn.Module) -> str:
    """What the repair did to the slice, on held-out images."""
    if not run.config.repair:
        return ""
    images = held_out_images(run)
    cut, repaired = (reporting.percent(top1(m, images, device=run.device)) for m in (slice_model(base, plan), small))
    return f"; {cut} of the held-out images right as it was cut, {repaired} repaired"


def _take_point(run: Run, model: nn.Module, at: float, say: Callable[[str], None]) -> None:
    """Make a point of the curve the run's plan."""
    found = read_json(existing(run, SEARCH, "search --pareto"))
    front = _curve(run, found)
    if not front:
        raise InputError(f"{run.folder} has no curve to take {at} from; run `sidt search {run.folder} --pareto` first")
    if (run.folder / STEPS).is_file():
        raise InputError(
            f"{run.folder / 'base'} was sliced on the way since the curve was found; run `sidt score {run.folder} "
            f"--set steps=1` and search again"
        )
    least = min(point.share for point in front)
    if not least <= at <= 1:
        raise InputError(f"--at {at} is not on the curve of {run.folder}; give a part from {least:.3g} to 1")
    scores = load_importance(existing(run, "scores.safetensors", "score"), space_for(model))
    rules = rules_of(run.config)
    budget = Budget(**{found["bounds"]: float(at)})
    latencies = latencies_for(latency_folder(run, model), model.to(run.device), scores, budget, rules, say)
    plan_at(scores, budget, nearest(front, at).knobs, rules=rules, latencies=latencies).save(run.folder / PLAN)
    write_json(run.folder / SEARCH, {**found, "at": at})


def _curve(run: Run, found: dict[str, Any]) -> list[Point]:
    """The curve that the search left."""
    try:
        return [Point(**point) for point in found["front"] if found["along"]]
    except (KeyError, TypeError):
        raise InputError(f"{run.folder / SEARCH} is damaged or of an earlier version; search again") from None


def finetune(run: Run) -> str:
    """Train the sliced model further; the result is the run folder's own checkpoint."""
    model, config, loss = load(existing(run, "sliced/config.json", "slice").parent), run.config, None
    data = data_of(config.data)
    if config.teacher is not None:
        options = config.teacher.model_dump()
        loss = distillation_loss(dense_model(run), model, smoothing=config.finetune.smoothing, **options)
    _fit(run, model, data, config.finetune, "finetune", loss)
    save(model.cpu(), run.folder, name=run.config.model.name, args=run.config.model.args)
    accuracy = reporting.percent(top1(model, data.holdout, device=run.device))
    return f"fine-tuned: {accuracy} on held-out images -> {run.folder}"


def evaluate(run: Run) -> str:
    """Top-1 on the test split, parameters, multiply-adds and latency of the models that are there."""
    folders = {"dense": run.folder / "dense", "sliced": run.folder / "sliced", "fine-tuned": run.folder}
    there = {name: folder for name, folder in folders.items() if (folder / "config.json").is_file()}
    if not there:
        raise InputError(f"no model in {run.folder}; run `sidt train {run.folder}` first")
    check_one_plan(run)
    test, rows, answered = data_of(run.config.data).test, {}, {}
    for name, folder in there.items():
        model = load(folder).to(run.device)
        counted = measure(model)
        answered[name] = answers(model, test, device=run.device)
        hits = answered[name] == test.labels
        rows[name] = {
            "top1": float(hits.mean()),
            "error": float(hits.std() / np.sqrt(len(hits))),
            "images": len(hits),
            "params": counted.params,
            "macs": counted.macs,
            "latency_ms": time_forward(model, counted.input_size, seconds=0.5),
            "device": run.device,
        }
    Answers(test.classes, test.labels, answered).save(run)
    write_json(run.folder / "evaluation.json", rows)
    return reporting.results_table(rows)


def write_report(run: Run) -> str:
    """Write ``report.md`` with its plots, and ``report.html``, from what the other steps left."""
    from sidt.runs.page import write_page  # here: no other step waits for the imports of plots

    model = dense_model(run)
    space = space_for(model)
    plan, search_result = searched_plan(run, space), read_json(existing(run, SEARCH, "search"))
    rows = read_json(existing(run, "evaluation.json", "evaluate"))
    check_one_plan(run)
    reporting.plot_kept(plan, run.folder / "kept.png")
    curve, judged_by = "", f"{_JUDGED_BY[search_result['objective']]} on held-out images"
    if front := _curve(run, search_result):
        kind, picture = search_result["bounds"], run.folder / "search.png"
        reporting.plot_front(front, search_result["along"], search_result["dense"], kind, judged_by, picture)
        curve = reporting.curve_text(front, space, judged_by)
    else:
        reporting.plot_search(
            search_result["values"],
            search_result["plain"],
            search_result["dense"],
            judged_by,
            run.folder / "search.png",
        )
    costs = reporting.complexity_text(report(space, by="block"), report(space, plan.sizes, by="block"), "md")
    gain, at = search_result["gain"], search_result.get("at")
    taken = "" if at is None else f", sliced at {search_result['bounds']}={at} of the curve"
    text = f"""# {run.config.model.name} on {run.config.data.name}, budget {search_result["budget"]}{taken}

{reporting.results_table(rows, "md")}

Top-1 on the test split, with one standard error. Latency: median of one image on {next(iter(rows.values()))["device"]}.

Search: {len(search_result["values"]) + search_result["pruned"]} trials; {gain["says"]}.

![units kept](kept.png)

![search](search.png)

{curve}{costs}
"""
    write_text(run.folder / "report.md", text)
    page = write_page(run, plan, search_result, front, rows, judged_by)
    return f"report -> {run.folder / 'report.md'}, {page}"


def run_all(run: Run, say: Callable[[str], None]) -> None:
    """All steps in order. Training and search go on from where they were stopped."""
    say(train(run))
    say(score(run, say))
    say(search(run, say))
    for step in (slice_, finetune, evaluate, write_report):
        say(step(run))


# --- what the steps share -----------------------------------------------------------------------------------------


def _says(gain: Gain, objective: str) -> str:
    """Whether the search paid, in one sentence."""
    if objective == "top1":
        return str(gain)
    return gain.sentence("{:+.4f}", "{:.4f}", f"the log-likelihood of {gain.samples} fresh samples")


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
    history = fit(model, data.train, config, val=data.holdout, folder=own, loss=loss, label=step)
    write_json(run.folder / f"{step}.json", history)
