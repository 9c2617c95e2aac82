"""The base of a run: the model that scores and plans are of, and what its slices stand on.

It is the dense model in another basis (:func:`sidt.align`), or, with ``steps``, a slice on the way. Plans on disk are
of the dense model.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from sidt.allocation.greedy import Rules
from sidt.allocation.steps import Slicer, steps_for
from sidt.cost.budget import Budget
from sidt.errors import InputError
from sidt.files import read_json
from sidt.importance import criteria
from sidt.importance.gates import GateConfig, learn_gates
from sidt.importance.scores import Importance
from sidt.importance.unlabelled import own_outputs
from sidt.runs.config import RunConfig
from sidt.runs.folder import Run, dense_model, searched_plan
from sidt.runs.images import data_of, sample
from sidt.runs.models import space_of
from sidt.runs.quality import gives_features, is_blind
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace
from sidt.sparsity.lines import NormConfig, learn_norms
from sidt.surgery.alignment import align
from sidt.surgery.compensation import compensate
from sidt.surgery.moments import Moments, load_moments, measure_moments
from sidt.surgery.slicing import slice_model
from sidt.training.batches import make_loader
from sidt.training.digest import weights_digest

LATENCY, MOMENTS, STEPS = "latency", "base/moments.safetensors", "base/steps.json"


def scored(run: Run, model: nn.Module) -> tuple[nn.Module, Importance, Moments | None]:
    """A model aligned, if it is to be repaired, its scores, and what its repair stands on."""
    config, space, moments = run.config.score, space_of(run.config, model), None
    if run.config.repair:
        model, moments = align(model, _measured(run, model, space))
        space = moments.space
    if config.method in ("gates", "hoyer"):
        found = _learned_scores(run, model, space)
    else:
        options = dict(config.options)
        if config.method == "random":
            options.setdefault("seed", run.config.seed)
        arguments: tuple[Any, ...] = (model,)
        if config.method not in ("random", "magnitude"):
            images = sample(data_of(run.config.data).calibration, config.images)
            arguments = (model.to(run.device), tqdm(make_loader(images, 64), desc="scores"))
        if config.method in ("taylor", "fisher") and is_blind(run, dense := dense_model(run)):
            options.setdefault("loss", own_outputs(features=gives_features(dense), seed=run.config.seed))
        criterion: Callable[..., Importance] = getattr(criteria, config.method)
        try:
            found = criterion(*arguments, space=space, **options)
        except TypeError as error:
            raise InputError(f"score.options {options}: {error}; see sidt.importance.{config.method}") from None
    return model, found, moments


def _learned_scores(run: Run, model: nn.Module, space: DimensionSpace) -> Importance:
    """Learn gates, or norms, on training images; a stopped training goes on."""
    config = run.config.score
    of: GateConfig | NormConfig = config.gates if config.method == "gates" else config.norms
    if config.options:
        where = "score.gates" if config.method == "gates" else "score.norms"
        raise InputError(f"score.options {config.options} has no meaning for {config.method}; set {where} instead")
    if is_blind(run, dense_model(run)):
        raise InputError(f"{config.method} learns from labels, and there are none; set score.method to taylor")
    if of.device == "auto":
        of = of.model_copy(update={"device": run.device})
    made_of = f"{of.model_dump_json()} {config.images} {run.config.data.model_dump_json()} {weights_digest(model)}"
    own = run.folder / "states" / f"{config.method}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    images = sample(data_of(run.config.data).train, config.images)
    if isinstance(of, GateConfig):
        return learn_gates(model, images, of, space=space, folder=own).importance
    return learn_norms(model, images, of, space=space, folder=own).importance


def _measured(run: Run, model: nn.Module, space: DimensionSpace) -> Moments:
    images = sample(data_of(run.config.data).calibration, run.config.score.images)
    return measure_moments(model.to(run.device), tqdm(make_loader(images, 64), desc="moments"), space=space)


def origin_of(run: Run, base: nn.Module) -> dict[str, Any]:
    """What the moments of the base model depend on."""
    data = run.config.data.model_dump(mode="json")
    return {"weights": weights_digest(base), "data": data, "images": run.config.score.images}


def moments_of(run: Run, base: nn.Module) -> Moments | None:
    """The moments of the base model: those that score left, if they are of this model and these images.

    None where the config wants no repair.
    """
    if not run.config.repair:
        return None
    made_of = origin_of(run, base)
    space = space_of(run.config, base)
    found = load_moments(run.folder / MOMENTS, space, made_of)
    if found is None:
        found = _measured(run, base, space)
        found.save(run.folder / MOMENTS, made_of)
    return found


def slicer_of(model: nn.Module, moments: Moments | None) -> Slicer:
    """Makes the small model of a plan: sliced, and repaired where there are moments."""
    if moments is None:
        return lambda plan: slice_model(model, plan)
    return lambda plan: compensate(model, plan, moments)


def rules_of(config: RunConfig) -> Rules:
    """What allocation may do."""
    search = config.search
    return Rules(search.kinds, search.freeze, search.min_units, search.round_to, search.uniform)


def steps_of(config: RunConfig) -> int:
    """In how many slices the small model is reached."""
    return config.steps or (1 if config.search.pareto else steps_for(config.budget.value()))


def budget_left(run: Run) -> Budget:
    """The budget, of the model that score left: absolute, if that was sliced on the way.

    Raises:
        InputError: that model is on the way to another budget, or was to be reached in another number of steps.
    """
    budget, path = run.config.budget.value(), run.folder / STEPS
    made: dict[str, Any] = read_json(path) if path.is_file() else {"steps": 1, "budget": str(budget)}
    wanted = run.config.steps or (made["steps"] if not run.config.search.pareto else 1)
    if made["budget"] != str(budget) or made["steps"] != wanted:
        changes = [f"--set budget.{name}={getattr(budget, name)}" for name in budget.bounded]
        raise InputError(
            f"{run.folder / 'base'} is on the way to {made['budget']} in {made['steps']} steps, not to {budget} in "
            f"{wanted}; run `sidt score {run.folder} {' '.join(changes)} --set steps={wanted}` first"
        )
    return Budget(**made["left"]) if "left" in made else budget


def latency_folder(run: Run, base: nn.Module) -> Path:
    """Where the times of the layers of a base are: those of a slice, which depends on the budget, on their own."""
    plan: DimensionPlan | None = getattr(base, "sidt_plan", None)
    if plan is None:
        return run.folder / LATENCY
    return run.folder / LATENCY / hashlib.sha256(str(plan.sizes).encode()).hexdigest()[:12]


def on_dense(base: nn.Module, plan: DimensionPlan) -> DimensionPlan:
    """A plan on the base as one on the dense model, which the base may be a slice of."""
    earlier: DimensionPlan | None = getattr(base, "sidt_plan", None)
    return plan if earlier is None else earlier.then(plan)


def on_base(run: Run, base: nn.Module) -> DimensionPlan:
    """The searched plan, on the base."""
    earlier: DimensionPlan | None = getattr(base, "sidt_plan", None)
    if earlier is None:
        return searched_plan(run, space_of(run.config, base))
    return searched_plan(run, earlier.space).after(earlier, space_of(run.config, base))
