"""Drafting a search-space file for a model, checked before anyone uses it."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from sidt.cost.complexity import shares
from sidt.drafting.draft import Draft, drafts
from sidt.errors import InputError
from sidt.files import write_text
from sidt.report.text import dimensions_table
from sidt.runs.checking import built, check_counted, check_masked, check_permuted, half_of, moved
from sidt.space.families import INNER_KINDS, KINDS
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import InputSize

_SEEDS = (0, 1)


@dataclass(frozen=True)
class Drafted:
    """A file that was written.

    Attributes:
        draft: what is in it.
        space: the space that it gives the model; ``None`` if it did not pass its check.
        why: why it did not pass; of one that did, why a bolder one did not.
    """

    draft: Draft
    space: DimensionSpace | None
    why: str


def draft_file(source: str, file: Path, input_size: InputSize | None = None) -> str:
    """Draft a search-space file for a model, check it and write it.

    Args:
        source: a timm model, or ``module:function`` of a function without arguments that gives the model.
        file: what is written; it must not be there yet.
        input_size: channels, height, width of the images; default: those that the model is for.

    Returns:
        The table of the dimensions, and what a person must look at.

    Raises:
        InputError: no draft can be made, or it did not pass its check; it is then written all the same, and says so.
    """
    if file.exists():
        raise InputError(f"{file} is already there; name another file, or move it away")
    if not file.parent.is_dir():
        raise InputError(f"the folder {file.parent} is not there; make it, or name another")
    model = built(source, input_size).eval()
    drafted = drafted_for(model, file, input_size)
    if drafted.space is None:
        raise InputError(f"the draft {file} did not pass its check, and is not to be used as it is: {drafted.why}")
    says = [f"{file} fits {type(model).__name__}: half of each dimension gone, sliced is masked, and costs are counted"]
    says += _left(drafted)
    says += ["look at these:", *(f"- {line}" for line in drafted.draft.look)] if drafted.draft.look else []
    return "\n".join([dimensions_table(drafted.space, shares(drafted.space)), "", *says])


def _left(drafted: Drafted) -> list[str]:
    return [f"left whole: {drafted.draft.left}, since without that: {drafted.why}"] if drafted.draft.left else []


def drafted_for(model: nn.Module, file: Path, input_size: InputSize | None = None) -> Drafted:
    """Write the boldest draft for a model that passes its check, or the first one with a comment that none does.

    The check is on a copy whose every parameter matters: fresh models have biases and scales of zero and one.

    Raises:
        InputError: no draft can be made.
    """
    twin, first, why = moved(model), None, ""
    with TemporaryDirectory() as folder:  # what has not passed stands nowhere under the name that was asked for
        trial = Path(folder) / file.name
        for one in drafts(model, input_size):
            first = first or one
            trial.write_text(one.text, encoding="utf-8")
            try:
                space = _checked(twin, trial, input_size)
            except InputError as error:
                why = why or " ".join(str(error).split()).replace(str(trial), str(file))
            else:
                write_text(file, _commented(one, why, passed=True))
                return Drafted(one, space, why)
    assert first is not None
    write_text(file, _commented(first, why, passed=False))
    return Drafted(first, None, why)


def _checked(model: nn.Module, file: Path, input_size: InputSize | None) -> DimensionSpace:
    """The space of a model by a file of which slices are what they should be.

    Raises:
        InputError: they are not, or nothing can be sliced.
    """
    space = space_for(model, input_size, file=file)
    if all(d.fixed or d.size < 2 for d in space.dimensions.values()):
        raise InputError(f"{file} leaves nothing to search: every axis of {space.model} stays whole")
    try:
        check_permuted(model, space)
        for seed in _SEEDS:
            check_masked(model, half_of(space, INNER_KINDS, seed))
            check_counted(model, half_of(space, KINDS, seed))
    except InputError:
        raise
    except Exception as error:  # whatever a slice of a wrong draft may end in
        raise InputError(f"a slice of {space.model} ends in {type(error).__name__}: {error}") from None
    return space


def _commented(one: Draft, why: str, passed: bool) -> str:
    """A file with what is to be said of it."""
    head = ["A draft, made from one forward. Half of each dimension gone, sliced is masked, and costs are counted."]
    if not passed:
        head = [f"A draft that DID NOT PASS its check: {why}"]
    elif one.left:
        head.append(f"Left whole: {one.left}, since without that: {why}")
    return "".join(f"# {line}\n" for line in [*head, *(f"Look at: {line}" for line in one.look)]) + one.text
