"""What the test images were answered by the models of a run, and how the small model's answers differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sidt.errors import InputError
from sidt.files import dump_compact, read_json, write_text
from sidt.report.text import quality
from sidt.runs.folder import Run, existing

ANSWERS = "answers.json"

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """The first choices of a run's models on the test images.

    Attributes:
        classes: the class names.
        labels: the right classes, shape [images].
        of: by model, the classes answered, shape [images].
    """

    classes: tuple[str, ...]
    labels: Labels
    of: dict[str, Labels]

    def save(self, run: Run) -> None:
        """Write them to the run folder."""
        of = {name: answered.tolist() for name, answered in self.of.items()}
        values = {"classes": list(self.classes), "labels": self.labels.tolist(), "answers": of}
        write_text(run.folder / ANSWERS, dump_compact(values))


def load_answers(run: Run, rows: dict[str, Any]) -> Answers:
    """The answers that ``evaluate`` left.

    Args:
        run: the run.
        rows: evaluation.json, by model.

    Raises:
        InputError: they are not there, damaged, or not those that evaluation.json was made of.
    """
    path, again = existing(run, ANSWERS, "evaluate"), f"run `sidt evaluate {run.folder}` again"
    found = read_json(path)
    try:
        of = {name: np.array(values, dtype=np.int64) for name, values in found["answers"].items()}
        answers = Answers(tuple(map(str, found["classes"])), np.array(found["labels"], dtype=np.int64), of)
        shapes = {array.shape for array in (answers.labels, *of.values())}
        top = max(array.max() for array in (answers.labels, *of.values()))
        least = min(array.min() for array in (answers.labels, *of.values()))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path} is damaged; {again}") from None
    if len(shapes) != 1 or answers.labels.ndim != 1 or least < 0 or top >= len(answers.classes):
        raise InputError(f"{path} is damaged; {again}")
    if {name: float((answered == answers.labels).mean()) for name, answered in of.items()} != {
        name: quality(row)[1] for name, row in rows.items()
    }:
        raise InputError(f"{path} and evaluation.json are of two evaluations; {again}")
    return answers


def class_changes(labels: Labels, before: Labels, after: Labels, most: int) -> list[tuple[int, int, float, float]]:
    """The classes whose accuracy changed most.

    Returns:
        Of each the class, its images, and its accuracy before and after; the greatest change first.
    """
    rows = []
    for label in np.unique(labels):
        of_class = labels == label
        old, new = (float((answered[of_class] == label).mean()) for answered in (before, after))
        if old != new:
            rows.append((int(label), int(of_class.sum()), old, new))
    return sorted(rows, key=lambda row: (-abs(row[3] - row[2]), row[0]))[:most]


def grown_pairs(labels: Labels, before: Labels, after: Labels, most: int) -> list[tuple[int, int, int, int]]:
    """The mistakes that became more frequent.

    Returns:
        Of each the right class, the one answered, and how many images were so before and after; the most grown first.
    """
    wrong, counts = np.unique(np.stack([labels, after])[:, after != labels], axis=1, return_counts=True)
    rows = []
    for right, answered, count in zip(*wrong.tolist(), counts.tolist(), strict=True):
        earlier = int(((labels == right) & (before == answered)).sum())
        if count > earlier:
            rows.append((right, answered, earlier, count))
    return sorted(rows, key=lambda row: (row[2] - row[3], row[:2]))[:most]


def changed_images(labels: Labels, before: Labels, after: Labels, most: int) -> list[int]:
    """Images that are answered otherwise: lost ones and won ones in turn, then those that stay wrong."""
    changed = before != after
    lost: list[int] = np.flatnonzero(changed & (before == labels)).tolist()
    won: list[int] = np.flatnonzero(changed & (after == labels)).tolist()
    rest: list[int] = np.flatnonzero(changed & (before != labels) & (after != labels)).tolist()
    return in_turn(lost, won, most) + rest[: max(0, most - len(lost) - len(won))]


def in_turn(first: Sequence[int], second: Sequence[int], most: int) -> list[int]:
    """Up to ``most`` of two lists, as many of each as there are, in turn."""
    half = most // 2
    ones = first[: max(half, most - len(second))]
    others = second[: most - len(ones)]
    mixed = [one for pair in zip(ones, others, strict=False) for one in pair]
    return [*mixed, *ones[len(others) :], *others[len(ones) :]]
