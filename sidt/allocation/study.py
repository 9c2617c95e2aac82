"""The search: an Optuna study over what a ranking cannot know (:mod:`sidt.allocation.knobs`).

The first trial has all factors at 1, which is the plain ranking, and every trial is projected onto the budget by
:func:`sidt.allocate`. In Pareto mode the budget is searched as well (:mod:`sidt.allocation.curve`).

An objective that gives its scores in parts costs less: after every part, Optuna's WilcoxonPruner stops a trial whose
parts are worse than the best trial's beyond noise. One that gives a single number stops none.

(A module named ``search`` would hide the function ``sidt.search``.)
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import MaxTrialsCallback, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn

from sidt.allocation.curve import Point, along, nearest, place_on_curve, reachable
from sidt.allocation.greedy import Rules, allocate
from sidt.allocation.knobs import WIDTH, knobs_of, plan_at
from sidt.allocation.storage import fail_gone, gives_signs, insist, opening, shared
from sidt.cost.budget import Budget
from sidt.cost.complexity import PlanCosts
from sidt.cost.latency import LayerLatencies
from sidt.errors import InputError
from sidt.importance.scores import Importance
from sidt.space.plan import DimensionPlan
from sidt.surgery.slicing import slice_model
from sidt.training.digest import weights_digest

Values = npt.NDArray[np.float64]
Scores = npt.ArrayLike | Tensor | Iterable[npt.ArrayLike | Tensor]
Objective = Callable[[nn.Module], Scores]
Sampler = Literal["tpe", "cmaes", "gp", "random"]
Multipliers = Mapping[str, float]  # log2 of the factors, by knob

# log2 of the factors on the width of the plain ranking that are tried first.
_WIDTH_FIRST = (-0.25, -0.5, -0.75, 0.25)
_STARTUP = 5  # random trials before the sampler learns; the plain ranking is a good start already
_PRUNED_AT = 0.1  # p of the Wilcoxon test that stops a trial: one hopeless trial in ten goes on to its end
_FIRST_PARTS = 2  # no trial is stopped before
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_GIVES = "it must give one number, or a number for every held-out sample, at once or in parts"


@dataclass(frozen=True)
class Gain:
    """What the search gained over the plain ranking, on data that neither has seen.

    Attributes:
        plain: mean score of the plain ranking's model.
        found: mean score of the search's model.
        error: standard error of their difference, over paired samples.
        samples: how many.
    """

    plain: float
    found: float
    error: float
    samples: int

    @property
    def difference(self) -> float:
        """Found minus plain."""
        return self.found - self.plain

    def __str__(self) -> str:
        """One sentence that says whether the search paid."""
        return self.sentence("{:+.2%}", "{:.2%}", f"{self.samples} fresh samples")

    def sentence(self, signed: str, plain: str, samples: str) -> str:
        """The same for scores of another form: format strings of a difference and of its error, and what was seen."""
        if self.difference == self.error == 0:
            return f"no trial was better than the plain ranking (checked on {samples})"
        error = f"{plain.format(self.error)} (one standard error)"
        numbers = f"{signed.format(self.difference)} +- {error} on {samples}"
        if np.isnan(self.error):
            return f"the search gained {signed.format(self.difference)} over the plain ranking; one score says no error"
        if self.difference > 2 * self.error:
            return f"the search gained {numbers} over the plain ranking"
        if self.difference < -2 * self.error:
            return f"the search LOST {numbers} against the plain ranking; use more held-out data or fewer trials"
        return f"the search found nothing beyond noise: {numbers} against the plain ranking"


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        plan: the plan of the best trial.
        plain: the plan of the plain ranking.
        value: the best trial's mean score on the held-out data; in Pareto mode, that of the point nearest the budget.
        plain_value: the plain ranking's.
        gain: both on fresh data, if there was any.
        multipliers: log2 of the best trial's multipliers, to warm-start another search.
        pruned: how many trials were stopped early.
        front: in Pareto mode, the trials that no other beats in both score and cost, cheapest first.
        study: Optuna's.
    """

    plan: DimensionPlan
    plain: DimensionPlan
    value: float
    plain_value: float
    gain: Gain | None
    multipliers: Multipliers
    pruned: int
    front: tuple[Point, ...]
    study: optuna.Study


def search(
    model: nn.Module,
    importance: Importance,
    budget: Budget,
    objective: Objective,
    *,
    fresh: Objective | None = None,
    trials: int = 50,
    timeout: float | None = None,
    seed: int = 0,
    sampler: Sampler = "tpe",
    rules: Rules | None = None,
    latencies: LayerLatencies | None = None,
    slicer: Callable[[DimensionPlan], nn.Module] | None = None,
    warm: Sequence[Multipliers] = (),
    jobs: int = 1,
    pareto: bool = False,
    storage: str | None = None,
    label: str = "",
    progress: bool = True,
) -> SearchResult:
    """Search the allocation of a budget over a model's dimensions.

    A search that is stopped keeps its finished trials in ``storage``; the same call goes on from there, also in
    several processes at once.

    Args:
        model: the trained dense model.
        importance: its scores.
        budget: what every trial must meet.
        objective: gives a sliced model a score for every held-out sample, at once or in parts of equal size (the
            same for every model), or one number; the mean is maximised.
        fresh: the same on other samples, to judge what was found.
        trials: finished trials in all, those that were stopped early and those of earlier calls included.
        timeout: seconds after which no new trial starts.
        seed: of Optuna's sampler.
        sampler: Optuna's TPE, CMA-ES, Gaussian process or random sampler.
        rules: what allocation may do.
        latencies: of the layers, for a budget with a latency.
        slicer: makes the model of a plan, for example sliced and repaired; default: :func:`sidt.slice_model`.
        warm: multipliers of earlier searches (``SearchResult.multipliers``), tried right after the plain ranking.
        jobs: trials at a time, in threads; more than one gives up that the same seed finds the same.
        pareto: one study over all budgets of the kind that the budget bounds, score against cost; the plan is that
            of the budget, and ``front`` the curve.
        storage: Optuna storage URL; default: in memory.
        label: what the objective is measured on; searches with other labels do not share trials.
        progress: whether to show Optuna's progress bar.

    Raises:
        InputError: the budget cannot be met, the scores are of another model, the objective gives no finite numbers,
            or the storage cannot be opened; or in Pareto mode, the budget has several bounds.
        KeyboardInterrupt: the search was stopped; finished trials are kept.
    """
    if trials < 1:
        raise InputError(f"trials is {trials}; it must be at least 1")
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be at least 1")
    rules = rules or Rules()
    space, costs = importance.space, PlanCosts(importance.space)
    ranges = knobs_of(space, rules)
    plain_plan = allocate(importance, budget, **asdict(rules), latencies=latencies)
    kind, limit = place_on_curve(budget, costs, latencies) if pareto else ("", 1.0)
    label = label if latencies is None else f"{label} {latencies.digest()}"
    name = _name(model, importance, budget, rules, kind, label)

    def plan_of(params: Mapping[str, float]) -> DimensionPlan:
        limits = Budget(**{kind: params["share"]}) if pareto else budget
        return plan_at(importance, limits, params, rules=rules, latencies=latencies)

    def run(trial: optuna.Trial) -> float | tuple[float, float]:
        params = {knob: trial.suggest_float(knob, *limits) for knob, limits in ranges.items()}
        if pareto:
            params["share"] = trial.suggest_float("share", shares[-1], 1.0, log=True)
        try:
            plan = plan_of(params)
        except InputError:  # so much width leaves too little of the budget
            raise optuna.TrialPruned from None
        used_params, used_macs = (int(c) for c in _cost(costs, plan))
        trial.set_user_attr("params", used_params)
        trial.set_user_attr("macs", used_macs)
        parts = []
        for step, part in enumerate(_parts(objective(make(plan)))):
            parts.append(part)
            if not pareto:  # Optuna stops no trial that has two objectives
                trial.report(float(parts[-1].mean()), step)
                if step + 1 >= _FIRST_PARTS and trial.should_prune():
                    raise optuna.TrialPruned
        value = float(np.concatenate(parts).mean())
        return (value, params["share"]) if pareto else value

    make = slicer or (lambda plan: slice_model(model, plan))
    start = dict.fromkeys(ranges, 0.0) | ({"share": limit} if pareto else {})
    splits = [start | {WIDTH: factor} for factor in _WIDTH_FIRST] if WIDTH in ranges else []
    if pareto:
        shares = reachable(importance, kind, limit, rules, latencies)
        splits = along(start, shares, narrower=WIDTH in ranges)
    first = [start, *(_warm(known, start, ranges) for known in warm), *splits]
    with _quiet():
        study = _open(storage, name, pareto, first)
        study.sampler = _sampler(sampler, seed + len(study.trials))  # with the same seed it would repeat itself
        begin = time.monotonic()
        # The callback counts the trials of all processes that share the storage.
        enough = MaxTrialsCallback(trials, states=_FINISHED)

        def go_on() -> None:
            left = trials - len(study.get_trials(states=_FINISHED))
            rest = None if timeout is None else max(0.0, timeout - (time.monotonic() - begin))
            if left > 0:
                study.optimize(
                    run, n_trials=left, timeout=rest, n_jobs=jobs, callbacks=[enough], show_progress_bar=progress
                )

        insist(go_on, storage)
    finished = study.get_trials(states=(TrialState.COMPLETE,))
    plain_trial = next((t for t in finished if t.params == start), None)
    if not finished:
        raise InputError(f"no trial finished within timeout={timeout} s; give the search more time")
    # A curve may be of another budget's search, whose plain ranking was judged at that budget. And where several trials
    # run at a time, the plain ranking's may have been stopped by another's scores, or run on in another process.
    plain_value = plain_trial.values[0] if plain_trial else float(_whole(objective(make(plain_plan))).mean())
    front = _front(study.best_trials) if pareto else ()
    # Ties go to the earliest trial, so that the plain ranking stands unless something is better.
    best = max(finished, key=lambda t: (t.values[0], -t.number))
    value, knobs = best.values[0], best.params
    if plain_value > value and not pareto:
        value, knobs = plain_value, start
    if pareto:
        point = nearest(front, limit)
        value, knobs = point.value, dict(point.knobs)
    plan = plan_at(importance, budget, knobs, rules=rules, latencies=latencies)
    gain = gain_on(fresh, make(plain_plan), make(plan)) if fresh is not None else None
    pruned = len(study.get_trials(states=(TrialState.PRUNED,)))
    return SearchResult(plan, plain_plan, value, plain_value, gain, knobs, pruned, front, study)


def _parts(scores: Any) -> Iterator[Values]:
    """What an objective gave, part by part.

    Raises:
        InputError: it gave something else than finite numbers, or none.
    """
    if isinstance(scores, list | tuple) and all(np.isscalar(score) for score in scores):
        scores = np.asarray(scores)  # a list of numbers is a whole, a list of arrays its parts
    whole = isinstance(scores, Tensor | np.ndarray | str) or not isinstance(scores, Iterable)
    part = None
    for part in [scores] if whole else scores:
        try:
            if part is None:  # NumPy would take it for NaN
                raise TypeError
            values = np.atleast_1d(np.asarray(part.tolist() if isinstance(part, Tensor) else part, dtype=np.float64))
        except (TypeError, ValueError):
            raise InputError(f"the objective gave {' '.join(repr(part).split())[:80]}; {_GIVES}") from None
        if not values.size or not np.isfinite(values).all():
            seen = f"{np.count_nonzero(~np.isfinite(values))} of {values.size} scores that are not finite"
            raise InputError(f"the objective gave {seen if values.size else 'an empty array'}; {_GIVES}")
        yield values.ravel()
    if part is None:
        raise InputError(f"the objective gave no score; {_GIVES}")


def _whole(scores: Any) -> Values:
    return np.concatenate(list(_parts(scores)))


def _warm(
    known: Multipliers, start: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """The knobs of another search, as far as this one has them."""
    return {**start, **{k: float(np.clip(known.get(k, start[k]), *limits)) for k, limits in ranges.items()}}


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name not in get_args(Sampler):
        raise InputError(f"sampler is {name!r}; choose from {', '.join(get_args(Sampler))}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # GP
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)


def _cost(costs: PlanCosts, plan: DimensionPlan) -> npt.NDArray[np.int64]:
    sizes = plan.sizes
    return costs.of(np.array([sizes[n] for n in costs.names], dtype=np.int64))


def _front(trials: list[FrozenTrial]) -> tuple[Point, ...]:
    """The trials that no other beats, cheapest first."""
    ordered = sorted(trials, key=lambda t: (t.values[1], t.number))
    first = {tuple(t.values): t for t in reversed(ordered)}  # of equal ones, the earliest
    points = [
        Point(t.values[0], t.values[1], t.user_attrs["params"], t.user_attrs["macs"], t.params) for t in first.values()
    ]
    return tuple(reversed(points))


def gain_on(fresh: Objective, plain: nn.Module, found: nn.Module) -> Gain:
    """What the search's model gained over the plain ranking's on fresh samples, which neither has seen."""
    ours, theirs = _whole(fresh(found)), _whole(fresh(plain))
    error = (ours - theirs).std(ddof=1) / np.sqrt(len(ours)) if len(ours) > 1 else float("nan")
    return Gain(float(theirs.mean()), float(ours.mean()), float(error), len(ours))


def _name(model: nn.Module, importance: Importance, budget: Budget, rules: Rules, pareto: str, label: str) -> str:
    """A study's name tells its searches apart, so that one storage can hold many and each resumes its own."""
    bounds = {} if pareto else asdict(budget)  # the curve is the same for all budgets
    made_of = [weights_digest(model), importance.space.sizes, bounds, asdict(rules), pareto, label]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    for _, scores in sorted(importance.scores.items()):  # files have them in this order
        digest.update(np.ascontiguousarray(scores).tobytes())
    return f"sidt-{digest.hexdigest()[:12]}"


def _open(storage: str | None, name: str, pareto: bool, first: list[dict[str, float]]) -> optuna.Study:
    """The study of this name, with the trials that come first in it or waiting in it."""
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][: 2 if pareto else 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=_PRUNED_AT, n_startup_steps=_FIRST_PARTS)
    with opening(storage):
        kept = None if storage is None else shared(storage)
        study = optuna.create_study(
            storage=kept, study_name=name, directions=directions, pruner=pruner, load_if_exists=True
        )
        alive: tuple[TrialState, ...] = ()
        if kept is not None and gives_signs(storage):
            fail_gone(study, kept)
            alive = (TrialState.RUNNING,)
        there: list[Any] = [t.params for t in study.get_trials(states=(*_FINISHED, *alive))]
        there += [t.system_attrs.get("fixed_params") for t in study.get_trials(states=(TrialState.WAITING,))]
        for known in first:
            if known not in there:
                study.enqueue_trial(known)
                there.append(known)
        return study


@contextmanager
def _quiet() -> Iterator[None]:
    """One progress bar instead of a log line for each trial, and of a traceback for one that Ctrl-C ends."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
