"""The study of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from sidt.allocation.study import SearchResult
from sidt.allocation.study import search as optuna_search
from sidt.allocation.timing import latencies_for
from sidt.cost.budget import Budget
from sidt.cost.latency import LayerLatencies
from sidt.files import read_json
from sidt.importance.scores import Importance, load_importance
from sidt.runs.base import budget_left, latency_folder, moments_of, rules_of, slicer_of
from sidt.runs.folder import SEARCH, Run, base_model, existing
from sidt.runs.images import held_out_images
from sidt.runs.models import space_of
from sidt.runs.quality import objective_of
from sidt.runs.workers import seed_of


@dataclass(frozen=True)
class Question:
    """What a run's search is asked.

    Attributes:
        model: the dense model in the basis of the scores.
        scores: its importance.
        held_out: the images that trials are judged on.
        budget: what is left of the run's.
        slicer: makes the model of a plan.
    """

    model: nn.Module
    scores: Importance
    held_out: Dataset[Any]
    budget: Budget
    slicer: Callable[..., nn.Module]


def question_of(run: Run) -> Question:
    """What a run's search is asked; what score measured is taken, and not measured again."""
    model = base_model(run)
    scores = load_importance(existing(run, "scores.safetensors", "score"), space_of(run.config, model))
    return Question(model, scores, held_out_images(run), budget_left(run), slicer_of(model, moments_of(run, model)))


def layers_of(run: Run, asked: Question, say: Callable[[str], None]) -> LayerLatencies | None:
    """The latencies of the layers, for a budget with one: measured once, and kept in the run's folder."""
    model = asked.model
    rules = rules_of(run.config)
    return latencies_for(latency_folder(run, model), model.to(run.device), asked.scores, asked.budget, rules, say)


def answer(run: Run, asked: Question, latencies: LayerLatencies | None, worker: int = 0) -> SearchResult:
    """Search, or go on with what is there of the study.

    Args:
        run: the run.
        asked: what its search is asked.
        latencies: of the layers, for a budget with one.
        worker: which of several processes this is; the first shows the progress.
    """
    config = run.config.search
    return optuna_search(
        asked.model,
        asked.scores,
        asked.budget,
        objective_of(run, asked.held_out),
        trials=config.trials,
        timeout=config.timeout,
        seed=seed_of(worker, run.config.seed),
        sampler=config.sampler,
        rules=rules_of(run.config),
        latencies=latencies,
        slicer=asked.slicer,
        warm=[read_json(existing(Run(w, run.config), SEARCH, "search"))["multipliers"] for w in config.warm],
        jobs=config.jobs,
        pareto=config.pareto,
        storage=config.storage or f"sqlite:///{run.folder / 'study.db'}",
        label=f"{run.config.data.model_dump_json()} {config.images} {config.objective} {run.config.repair}",
        progress=not worker,
    )


def help_to_answer(run: Run, worker: int, wait: Callable[[], object]) -> None:
    """What one more process does for a run's search; see :func:`sidt.runs.workers.helped`."""
    asked = question_of(run)
    wait()
    answer(run, asked, layers_of(run, asked, lambda text: None), worker)
