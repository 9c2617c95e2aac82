"""Alignment: another basis for q/k, v and the width, in which few units carry nearly everything.

The model computes the same. The width is rotated where it can be (:mod:`sidt.surgery.rotation`).

Logits are products of q and k, and the output projection is a product with v, so any invertible matrix may be put
between the two. Per head:

- q/k: the basis of the singular vectors of the logits ``q k^T`` over the calibration images, so that the first r units
  are the best rank-r fit of the logits. A shift of all keys adds the same to all logits of a query, which softmax
  ignores, so k is taken without its mean.
- v: the basis of the singular vectors of what the head adds to the residual stream.

Both are singular value decompositions of d x d matrices, from second moments alone. Scores, plans and slices are then
those of any model; the plan of an aligned model belongs to its weights, not to those that it was aligned from.
"""

import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from sidt.space.axes import Axis, axis_size, layout
from sidt.space.space import DimensionSpace, space_for
from sidt.surgery.heads import with_head
from sidt.surgery.moments import Moments
from sidt.surgery.narrowing import given_to
from sidt.surgery.rotation import basis, columns_of, fold_norms, rotatable, rotate, turned
from sidt.surgery.slicing import is_bilinear

Model = TypeVar("Model", bound=nn.Module)

_JITTER = 1e-7  # of the largest moment: directions that no image uses stay finite


def align(model: Model, moments: Moments) -> tuple[Model, Moments]:
    """A copy of a model, equal in what it computes, with the units of q/k, v and the width ordered by what they carry.

    Left as they are: widths that cannot be rotated (``sidt spaces MODEL`` says why), q/k that meet in another way than
    by their product (qk-norm, the cosine attention of Swin V2), and v that something else reads as well (output gates,
    norms inside the attention).

    A timm model without a head (``num_classes=0``) gets a linear one, where the way back of its features is: it gives
    the same features, and timm builds it with as many classes as there are features.

    Args:
        model: the dense model.
        moments: of its layers' inputs.

    Returns:
        The aligned model, and the moments of its layers' inputs.
    """
    aligned = copy.deepcopy(model)
    if not set(moments.space.places) <= {name for name, _ in chain(model.named_parameters(), model.named_buffers())}:
        aligned, _ = with_head(aligned, space_for(model, moments.space.trace.input_size))  # as for the moments
    moments = _rotate(aligned, moments)
    space = moments.space
    changed: dict[tuple[str, int], Tensor] = {}
    with torch.no_grad():
        for heads, owner in space.attention.items():
            qk, v = (_sites(space, heads, kind) for kind in ("qk", "v"))
            if qk is not None and is_bilinear(aligned.get_submodule(owner), space.forwards):
                _align_qk(aligned, qk, moments)
            if v is not None:
                changed |= _align_v(aligned, v, moments)
    return aligned, moments.replaced(changed.items())


def _rotate(model: nn.Module, moments: Moments) -> Moments:
    """Rotate every width that can be, in place; returns the moments of what is read then."""
    space = moments.space
    widths = rotatable(space)
    if not widths:
        return moments
    fold_norms(model, space)
    for width, stream in widths.items():
        inputs = ((norm, given_to(model, moments, stream, norm, readers[0])) for norm, readers in stream.norms.items())
        matrix = basis(model, space, width, inputs)
        rotate(model, space, width, matrix)
        behind = {weight for readers in stream.norms.values() for weight in readers}
        moments = moments.replaced(
            (rows, _turned(moments.read_by(*rows), columns_of(space, stream, rows[0]), width, space, matrix))
            for rows in moments.inputs
            if rows[0] in behind
        )
    model.sidt_rotated = tuple(widths)  # type: ignore[assignment]
    return replace(moments, space=space.ordered(widths))


def _turned(moment: Tensor, axis: Axis, width: str, space: DimensionSpace, matrix: Tensor) -> Tensor:
    """Second moments of inputs whose units, which come first, are multiplied by a matrix."""
    result = moment.clone()
    for dim in (0, 1):
        units = result.narrow(dim, 0, axis_size(axis, space.sizes))
        units.copy_(turned(units, dim, axis, width, space.sizes, matrix))
    return result


@dataclass(frozen=True)
class _Sites:
    """Where the units of q/k or v of one attention live.

    Attributes:
        writers: weights, the first of the rows, and from which row to which each next head begins; q before k.
        biases: the same of their biases, if they have any.
        reader: the weight that has them as its columns, for v.
        heads: how many heads.
        size: units in each.
    """

    writers: tuple[tuple[str, int, int], ...]
    biases: tuple[tuple[str, int, int], ...]
    reader: str | None
    heads: int
    size: int


def _sites(space: DimensionSpace, heads: str, kind: str) -> _Sites | None:
    """None if something beside the writers, their biases and the reader knows the units."""
    child = next(d for d in space.dimensions.values() if d.per == heads and d.kind == kind)
    writers: list[tuple[str, int, int]] = []
    biases: list[tuple[str, int, int]] = []
    if child.fixed or child.normed or not space.sizes[heads]:
        return None
    readers, others = [], False
    for name, place in space.places.items():
        for position, axis in enumerate(place.axes):
            for term, at in layout(axis, space.sizes):
                if child.name in term:
                    if term != (heads, child.name):
                        others = True
                    elif position == 1 and len(axis) == 1:
                        readers.append(name)
                    elif position == 0:
                        step = int(at[-1, 0] - at[0, 0]) // max(len(at) - 1, 1)
                        (biases if len(place.axes) == 1 else writers).append((name, int(at[0, 0]), step))
                    others = others or place.is_buffer
    count = 2 if kind == "qk" else 1
    complete = len(writers) == count and len(biases) in (0, count) and len(readers) == 2 - count
    if others or not complete:
        return None
    return _Sites(
        tuple(writers), tuple(biases), readers[0] if readers else None, space.sizes[heads], space.sizes[child.name]
    )


def _stretch(model: nn.Module, site: tuple[str, int, int], sites: _Sites) -> Tensor:
    """A view of the rows of all heads: [heads, size, columns], or [heads, size] of a bias."""
    name, start, step = site
    tensor = model.get_parameter(name).data[start:]
    row, *columns = tensor.stride()
    return tensor.as_strided((sites.heads, sites.size, *tensor.shape[1:]), (step * row, row, *columns))


def _align_qk(model: nn.Module, sites: _Sites, moments: Moments) -> None:
    q, k = (_stretch(model, site, sites) for site in sites.writers)
    biases = [_stretch(model, site, sites) for site in sites.biases]
    read_q, read_k = (moments.read_by(name, start) for name, start, _ in sites.writers)
    mean = read_k[-1, :-1]
    spread_k = read_k[:-1, :-1] - torch.outer(mean, mean)
    for head in range(sites.heads):
        whole = _rows(q[head])
        if biases:
            whole = torch.cat([whole, biases[0][head].double().cpu()[:, None]], 1)
        root_q = _root(whole @ read_q[: whole.shape[1], : whole.shape[1]] @ whole.T)
        root_k = _root(_rows(k[head]) @ spread_k @ _rows(k[head]).T)
        left, values, _ = torch.linalg.svd(root_q @ root_k.T)
        scale = values.clamp(min=float(values[0]) * _JITTER).sqrt()
        to_q = torch.linalg.solve(root_q, left * scale)
        to_k = torch.linalg.inv(to_q).T  # exactly: q k^T stays what it is
        for view, change in zip((q, k, *biases), (to_q, to_k, to_q, to_k), strict=False):
            view[head].copy_((change.T @ _rows(view[head])).view_as(view[head]))


def _align_v(model: nn.Module, sites: _Sites, moments: Moments) -> dict[tuple[str, int], Tensor]:
    """Returns the moments of what the reader reads now."""
    assert sites.reader is not None
    (v,), biases = (_stretch(model, site, sites) for site in sites.writers), sites.biases
    reader = model.get_parameter(sites.reader).data
    read = moments.read_by(sites.reader)
    moved = read.clone()
    for head in range(sites.heads):
        own = slice(head * sites.size, (head + 1) * sites.size)
        columns = _rows(reader)[:, own]
        root = _root(read[own, own])
        left, values, _ = torch.linalg.svd(root @ columns.T, full_matrices=columns.shape[0] < sites.size)
        scale = torch.ones(sites.size, dtype=torch.float64) * values[0] * _JITTER
        scale[: len(values)] = values.clamp(min=float(values[0]) * _JITTER)
        to_v = torch.linalg.solve(root, left * scale.sqrt())
        moved[own] = to_v.T @ moved[own]
        moved[:, own] = moved[:, own] @ to_v
        for view in (v, *(_stretch(model, site, sites) for site in biases)):
            view[head].copy_((to_v.T @ _rows(view[head])).view_as(view[head]))
        reader[:, own].copy_(torch.linalg.solve(to_v, columns.T).T.reshape(reader[:, own].shape))
    return {(sites.reader, 0): moved}


def _rows(tensor: Tensor) -> Tensor:
    """As float64 rows on the CPU, whatever follows the first axis flattened."""
    return tensor.detach().double().cpu().flatten(1) if tensor.ndim > 1 else tensor.detach().double().cpu()[:, None]


def _root(moment: Tensor) -> Tensor:
    """An invertible R with ``R^T R = moment``, but for directions that have next to no moment."""
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = values.clamp(min=max(float(values[-1]) * _JITTER, 1e-30)).sqrt()[:, None] * vectors.T
    return root
