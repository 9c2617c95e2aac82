"""The figures that Optuna draws of a finished search."""

import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState
from optuna.visualization import (
    plot_hypervolume_history,
    plot_optimization_history,
    plot_param_importances,
    plot_pareto_front,
)

from sidt.allocation.storage import shared
from sidt.errors import InputError

_ENOUGH = 10  # finished trials; the importances of knobs in fewer are noise
_FILE = "sqlite:///"
TICKS = [mantissa * 10.0**power for power in (-1, 0, 1) for mantissa in (1, 2, 5)] + [100.0]  # of an axis of percents


def open_study(storage: str, name: str) -> optuna.Study:
    """A study that is there.

    Args:
        storage: Optuna storage URL. It may hold a password, so no message repeats it.
        name: the study's.

    Raises:
        InputError: there is no such storage, or it has no such study.
    """
    if storage.startswith(_FILE) and not Path(storage.removeprefix(_FILE)).is_file():  # Optuna would make an empty one
        raise InputError(f"the study's file {storage.removeprefix(_FILE)} is not there; search again")
    try:
        return optuna.load_study(study_name=name, storage=shared(storage))
    except InputError:
        raise
    except KeyError:
        raise InputError(f"the storage has no study {name}; search again") from None
    except Exception as error:  # SQLAlchemy and its drivers have errors of many roots
        raise InputError(
            f"the storage of the study cannot be read ({type(error).__name__}); is it reachable?"
        ) from None


def study_figures(study: optuna.Study, score: str, dense: float, cost: str = "") -> list[tuple[str, Any]]:
    """Optuna's plotly figures of a study, each with a sentence that says what to see.

    Args:
        study: of one objective, the score; or of two, the score and the share of the cost.
        score: what the score is.
        dense: the dense model's.
        cost: what the share is of, for a study of two objectives.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if len(study.directions) > 1:
            front = plot_pareto_front(
                study,
                targets=lambda trial: (100 * trial.values[1], trial.values[0]),
                target_names=[f"{cost} left, in %", score],
            )
            front.update_traces(marker={"showscale": False})
            front.update_xaxes(type="log", tickvals=TICKS)
            worst = [min(trial.values[0] for trial in finished), 1.0]
            history = plot_hypervolume_history(study, worst)
            history.update_yaxes(title="area under the curve")
            return [
                ("Every trial, and in red those that no other beats in both score and cost; darker is later.", front),
                ("The area between the curve and its worst corner: once it is flat, more trials add little.", history),
            ]
        history = plot_optimization_history(study, target_name=score)
        for trace, name in zip(history.data, ("trial", "best so far"), strict=False):
            trace.name = name
        history.add_hline(y=dense, line={"dash": "dot", "color": "var(--quiet)"}, annotation_text="dense")
        history.update_layout(xaxis_title="trial")
        figures = [("A point for each trial: once the line of the best is flat, more trials add little.", history)]
        values = {trial.values[0] for trial in finished}
        if len(finished) >= _ENOUGH and len(values) > 1 and finished[0].params:
            importances = plot_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), target_name=score)
            sentence = "How much of the scores' spread each knob of the search explains (fANOVA)."
            figures.append((sentence, importances))
    return figures
