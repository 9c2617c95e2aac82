"""Checking a search-space file on a model: what is missing in it, what is never used, and whether slices are right."""

import copy
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidt.cost.complexity import measure, report, shares
from sidt.errors import InputError
from sidt.export.models import create_model
from sidt.report.text import dimensions_table
from sidt.space.axes import kept_indices, names
from sidt.space.binding import get_attribute
from sidt.space.families import INNER_KINDS, KINDS, Family, Kind, Line, match_line
from sidt.space.finding import family_of
from sidt.space.outputs import tensors_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import InputSize
from sidt.surgery.slicing import mask_model, slice_model

_CLOSE = 1e-4  # of the largest output; a mask and a slice differ by rounding at most
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_file(source: str, file: Path, input_size: InputSize | None = None) -> str:
    """Check a search-space file on a model.

    Args:
        source: a timm model, or ``module:function`` of a function without arguments that gives the model.
        file: the file.
        input_size: channels, height, width of the images; default: those that the model is for.

    Returns:
        The table of the dimensions, what was checked, and which lines the model has nothing for.

    Raises:
        InputError: the file does not fit the model, a class or a module that it names cannot be imported, or a slice
            of the model is not what it should be. One line names what is wrong.
    """
    model = built(source, input_size).eval()
    family = family_of(model, file)
    for name in family.models:
        _import(name, file)
    space = space_for(model, input_size, file=file)
    twin = moved(model)
    try:
        check_masked(twin, half_of(space, INNER_KINDS))
        check_counted(twin, half_of(space, KINDS))
    except InputError as error:
        raise InputError(f"{file}: {error}{_first_wrong(twin, space, family)}") from None
    unused = list(unused_lines(family, model))
    says = [f"lines that this model has nothing for: {', '.join(unused)}"] if unused else []
    checked = (
        f"{file} fits {type(model).__name__}: half of each dimension gone, sliced is masked, and costs are counted"
    )
    return "\n".join([dimensions_table(space, shares(space)), "", checked, *says])


def built(source: str, input_size: InputSize | None) -> nn.Module:
    """The model that a name of timm's, or a function, stands for.

    Raises:
        InputError: there is none.
    """
    if not _FUNCTION.fullmatch(source):
        return create_model(source, {}, input_size=input_size)
    module, _, function = source.partition(":")
    try:
        model = getattr(import_module(module), function)()
    except Exception as error:  # whatever a function of somebody's own ends in
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"cannot build a model by {source}: {reason}") from None
    if not isinstance(model, nn.Module):
        raise InputError(f"{source} gives {type(model).__name__}; it must give a model")
    return model


def _import(name: str, file: Path) -> None:
    """Refuse a class that is not there."""
    module, _, leaf = name.rpartition(".")
    try:
        getattr(import_module(module), leaf)
    except (ImportError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} is for {name}, which cannot be imported: {reason}; write module.Class") from None


# --- slices ----------------------------------------------------------------------------------------------------------


def _first_wrong(model: nn.Module, space: DimensionSpace, family: Family) -> str:
    """The first dimension that is wrong by itself, and its lines; nothing if only several are."""
    for name, dimension in space.dimensions.items():
        plan = half_of(space, INNER_KINDS, only=name)
        try:
            if plan.keep.get(name) is None or dimension.kind not in INNER_KINDS or dimension.fixed:
                continue
            check_masked(model, plan)
            check_counted(model, plan)
        except InputError:
            tensors = [t for t, place in space.places.items() if any(name in names(axis) for axis in place.axes)]
            found = [match_line(family, family.parameters, tensor) for tensor in tensors]
            lines = dict.fromkeys(line.template for line, _ in filter(None, found))
            return f"; {name} is wrong by itself, which is in {', '.join(list(lines)[:6])}"
    return ""


def half_of(space: DimensionSpace, kinds: tuple[Kind, ...], seed: int = 0, *, only: str | None = None) -> DimensionPlan:
    """A random plan that keeps about half of every dimension of some kinds, or of one; of v more than of q and k."""
    rng = np.random.default_rng(seed)
    keep: dict[str, Any] = {}
    for name, dimension in space.dimensions.items():
        if dimension.fixed or dimension.kind not in kinds or not dimension.size or only not in (None, name):
            continue
        count = max(1, dimension.size * 3 // 4 if dimension.kind == "v" else dimension.size // 2)
        parents = None if dimension.per is None else len(keep.get(dimension.per, range(space.sizes[dimension.per])))
        rows = [np.sort(rng.permutation(dimension.size)[:count]) for _ in range(1 if parents is None else parents)]
        keep[name] = rows[0] if parents is None else np.array(rows).reshape(len(rows), count)
    return DimensionPlan(space, keep)


def moved(model: nn.Module) -> nn.Module:
    """A copy with every parameter off its trivial start."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 / max(parameter[0].numel(), 1) ** 0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.0, generator=generator)
    return twin


@torch.no_grad()
def check_masked(model: nn.Module, plan: DimensionPlan) -> None:
    """Refuse a plan of heads, qk, v and mlp of which the sliced model does not compute what the masked one does.

    Raises:
        InputError: they differ, or a sublayer cannot take its sizes.
    """
    space, image = plan.space, _image(model, plan.space)
    sliced, masked = (_outputs(f(model, plan), image, space) for f in (slice_model, mask_model))
    for a, b in zip(sliced, masked, strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=_CLOSE * float(b.abs().max())):
            gap = (
                f"{float((a - b).abs().max()):.2g}" if a.shape == b.shape else f"{list(a.shape)} beside {list(b.shape)}"
            )
            raise InputError(
                f"the search space {space.family} is wrong for {space.model}: what is sliced and what is masked differ "
                f"by {gap}; look at the lines whose products or order may be another, and at the attention's forward"
            )


@torch.no_grad()
def check_permuted(model: nn.Module, space: DimensionSpace, seed: int = 0) -> None:
    """Refuse a space whose units, in another order in every place, give a model that computes another thing.

    It sees what masks do not: whether a width is in every place where it has to be.

    Raises:
        InputError: the outputs are others.
    """
    rng, keep = np.random.default_rng(seed), {}
    for name, dimension in space.dimensions.items():
        rows = [np.arange(dimension.size) for _ in range(space.sizes[dimension.per] if dimension.per else 1)]
        rows = rows if dimension.fixed else [rng.permutation(row) for row in rows]
        keep[name] = np.array(rows).reshape(len(rows), -1) if dimension.per else rows[0]
    turned, image = copy.deepcopy(model), _image(model, space)
    for name, place in space.places.items():
        tensor = turned.get_buffer(name) if place.is_buffer else turned.get_parameter(name)
        found = tensor.clone()
        for d, axis in enumerate(place.axes):
            order = torch.from_numpy(kept_indices(axis, space.sizes, keep, space.per))
            found = found.index_select(d, order.to(found.device))
        tensor.copy_(found)
    for a, b in zip(_outputs(turned, image, space), _outputs(model, image, space), strict=True):
        gap = float((a.flatten().sort()[0] - b.flatten().sort()[0]).abs().max())  # a width may go out of the model
        if gap > _CLOSE * float(b.abs().max()):
            raise InputError(
                f"the search space {space.family} is wrong for {space.model}: its units in another order give another "
                f"output, by {gap:.2g}; look at the lines of the widths"
            )


@torch.no_grad()
def check_counted(model: nn.Module, plan: DimensionPlan) -> None:
    """Refuse a plan of which the sliced model does not run, or has other costs than the space says.

    Raises:
        InputError: parameters or multiply-adds are others, or a sublayer cannot take its sizes.
    """
    space, small = plan.space, slice_model(model, plan)
    _outputs(small, _image(model, space), space)
    says, counted = report(space, plan.sizes), measure(small, space.trace.input_size)
    for what in ("params", "macs"):
        predicted, seen = getattr(says, what), getattr(counted, what)
        if predicted != seen:
            raise InputError(
                f"the search space {space.family} says {predicted:,} {what} of a slice of {space.model}, and counted "
                f"are {seen:,}"
            )


def _image(model: nn.Module, space: DimensionSpace) -> Tensor:
    image = torch.randn(1, *space.trace.input_size, generator=torch.Generator().manual_seed(0))
    return image.to(next(model.parameters()))


def _outputs(model: nn.Module, image: Tensor, space: DimensionSpace) -> list[Tensor]:
    """The tensors that a model makes of an image."""
    try:
        out = model(image)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"a slice of {space.model} does not run by the search space {space.family}: {reason}; "
            f"an attention or another sublayer may need a forward of its own (CONTRIBUTING.md)"
        ) from None
    return list(tensors_of(out))


# --- lines -----------------------------------------------------------------------------------------------------------


def unused_lines(family: Family, model: nn.Module) -> Iterator[str]:
    """The lines of a file that a model has nothing for, each after the name of its section."""
    tensors = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    modules = [n for n, _ in model.named_modules()]
    for line in family.parameters:
        if not any(line.pattern.fullmatch(name) for name in tensors):
            yield f"parameters {line.template}"
    for line in family.attributes:
        if not any(get_attribute(model, path) is not None for path in _paths(line, tensors, modules)):
            yield f"attributes {line.template}"
    for section, templates in (
        ("norms", {*family.norms, *(r for readers in family.norms.values() for r in readers if r != "_")}),
        ("scales", {*family.scales}),
        ("padded", {*family.padded}),
        ("whole", {*family.whole}),
    ):
        for template in sorted(templates):
            pattern = re.compile(re.sub(r"\\\{[a-z]\\\}", r"\\d+", re.escape(template)))
            if not any(pattern.fullmatch(name) for name in (*modules, *tensors)):
                yield f"{section} {template}"


def _paths(line: Line, tensors: list[str], modules: list[str]) -> Iterator[str]:
    """The paths that an attribute's template may stand for: its indices are those of the model's names."""
    owner, _, leaf = line.template.rpartition(".")
    if "{" not in line.template:
        yield line.template
        return
    pattern = re.compile(re.sub(r"\\\{[a-z]\\\}", r"\\d+", re.escape(owner)))
    yield from (f"{name}.{leaf}" for name in modules if pattern.fullmatch(name))
    if owner.endswith("}"):  # of a list that is no module, such as feature_info.{i}
        yield re.sub(r"\{[a-z]\}", "0", line.template)
