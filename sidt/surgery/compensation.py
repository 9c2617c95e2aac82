"""Repair without training: the layers that lost inputs are refitted by least squares, in closed form.

What a layer read from the dropped units is predicted from the kept ones. With G the second moments of its inputs (the
bias is a column), K the kept columns and D the dropped ones::

    W' = W[:, K] + W[:, D] G[D, K] (G[K, K] + ridge I)^-1

so with nothing dropped the weights stay bit for bit, and the squared error on the calibration images is never above
that of plain slicing. q/k and v need no repair once the model is aligned (:func:`sidt.align`): the first units are
the best fit that there is.
"""

import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sidt.errors import InputError
from sidt.space.axes import kept_indices, names
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace
from sidt.surgery.moments import Forward, Moments, Rows, run_images, watching
from sidt.surgery.narrowing import narrowed
from sidt.surgery.slicing import explicit, slice_model

Model = TypeVar("Model", bound=nn.Module)

_RIDGE = 1e-4  # of the mean variance of the kept inputs


def compensate(model: Model, plan: DimensionPlan, moments: Moments) -> Model:
    """Slice a model by a plan and repair the layers that lost inputs: heads, v, mlp, and the width if it is rotated.

    A few hundred images are enough for the moments; the repair itself takes milliseconds a layer. Layers that lost
    units of a width that is not rotated, or units behind a norm over them, are sliced plainly; see :func:`refit_width`.

    Args:
        model: the dense model.
        plan: what is kept of it.
        moments: of its layers' inputs, as :func:`sidt.measure_moments` or :func:`sidt.align` give them.

    Raises:
        InputError: the plan or the moments are of another model, or a layer was not run by the moments' forward.
    """
    space, sliced = plan.space, slice_model(model, plan)
    with torch.no_grad():
        for name in readers(space):
            place = space.places[name]
            rows, columns = (
                torch.from_numpy(kept_indices(axis, space.sizes, plan.keep, space.per)) for axis in place.axes[:2]
            )
            dense = model.get_parameter(name)
            if not len(columns) < dense.shape[1]:
                continue
            weight, bias = _with_bias(model, name)
            moment = moments.read_by(name)
            taps = dense[0, 0].numel()  # columns of a convolution are input * taps + tap
            columns = (columns[:, None] * taps + torch.arange(taps)).flatten()
            if bias is None:
                moment = moment[:-1, :-1]
            else:
                columns = torch.cat([columns, torch.tensor([dense.shape[1] * taps])])
            weight, near = weight[rows], weight[rows][:, columns]
            dropped = torch.ones(weight.shape[1], dtype=torch.bool)
            dropped[columns] = False
            seen = moment[:, columns]
            _write(sliced, name, refit(near, weight[:, dropped] @ seen[dropped], seen[columns]))
        for name, reads in narrowed(model, plan, moments).items():
            weight, bias = _with_bias(model, name)
            moment = moments.read_by(name)
            near = weight[:, reads.columns] / reads.factor
            if bias is None:
                weight = torch.cat([weight, weight.new_zeros(len(weight), 1)], 1)
            else:
                near = torch.cat([near, weight[:, -1:]], 1)
            if not _is_transposed(model, name):  # whose rows are outputs of nothing that a plan drops
                rows = torch.from_numpy(kept_indices(space.places[name].axes[0], space.sizes, plan.keep, space.per))
                weight, near = weight[rows], near[rows]
            cross, seen = reads(moment @ reads.widened(weight).T).T, reads(reads(moment).T)
            inputs = near.shape[1]  # the constant 1 is one for a layer with a bias
            moment = seen[:inputs, :inputs]
            _write(sliced, name, refit(near, cross[:, :inputs] - near @ moment, moment))
    return sliced


def refit_width(
    model: nn.Module,
    sliced: Model,
    plan: DimensionPlan,
    batches: Iterable[Any],
    *,
    forward: Forward = run_images,
    progress: bool = True,
) -> Model:
    """Refit the layers that lost width, or units of a norm before them, one after the other in the order they run.

    Norms have other statistics over fewer units, so what such a layer reads is not a part of what it read before: both
    models run on the images, and each layer is fitted to what the dense one writes, given what the sliced one reads by
    then. That is two forward passes over the images for each layer; a hundred images are enough for a small model.

    Args:
        model: the dense model.
        sliced: what ``slice_model`` or ``compensate`` made of it.
        plan: by which.
        batches: (images, targets), or what ``forward`` takes; they are kept in memory.
        forward: runs a model on a batch.
        progress: whether to show a progress bar.

    Raises:
        InputError: there is no batch.

    Returns:
        A copy of the sliced model; the sliced model itself if no norm lost units.
    """
    space, lost = plan.space, _lost_width(plan)
    if not lost:
        return sliced
    images = list(batches)
    if not images:
        raise InputError("the repair of the width got no batch; give at least one image")
    dense, result, twin = explicit(model, space), copy.deepcopy(sliced), explicit(sliced, space)
    with torch.no_grad():
        order = _order(dense, lost, images[0], forward)
        for rows in tqdm(order, desc="repair of the width", disable=not progress):
            _refit_one(dense, twin, rows, plan, images, forward)
    result.load_state_dict(twin.state_dict())
    return result


def _lost_width(plan: DimensionPlan) -> list[str]:
    space, sizes = plan.space, plan.sizes
    behind = [d for d in space.dimensions.values() if (d.kind == "width" and not d.ordered) or d.normed]
    lost = {d.name for d in behind if sizes[d.name] < d.size}
    return [
        name
        for name, place in space.places.items()
        if name in space.trace.positions and len(place.axes) > 1 and names(place.axes[1]) & lost
    ]


def _order(model: nn.Module, wanted: list[str], batch: Any, forward: Forward) -> list[Rows]:
    """The rows of some weights in the order in which they first read something."""
    seen: dict[Rows, None] = {}
    with watching(model, wanted, lambda rows, _, __: seen.setdefault(rows)):
        forward(model, batch)
    return list(seen)


class _Enough(Exception):
    """Ends a forward pass: what was wanted of it has been seen."""


def _reads(model: nn.Module, rows: Rows, batch: Any, forward: Forward) -> tuple[Tensor, Tensor]:
    """What some rows of a weight read first, [positions, columns + 1] with the constant 1, and these rows."""
    found: list[tuple[Tensor, Tensor]] = []

    def see(seen: Rows, x: Tensor, weight: Tensor) -> None:
        if seen == rows:
            found.append((torch.cat([x, x.new_ones(len(x), 1)], 1).double().cpu(), weight))
            raise _Enough

    with suppress(_Enough), watching(model, [rows[0]], see):
        forward(model, batch)
    return found[0]


def _refit_one(
    dense: nn.Module, sliced: nn.Module, rows: Rows, plan: DimensionPlan, batches: list[Any], forward: Forward
) -> None:
    """Fit the rows of one weight of the sliced model, in place."""
    (name, start), space = rows, plan.space
    keep = kept_indices(space.places[name].axes[0], space.sizes, plan.keep, space.per)
    # The rows before these in the sliced weight are those kept of the rows before these in the dense one.
    own = (name, int((keep < start).sum()))
    cross = moment = torch.zeros(())
    for batch in batches:
        (x, weight), (read, small) = _reads(dense, rows, batch, forward), _reads(sliced, own, batch, forward)
        kept = torch.from_numpy(keep[(keep >= start) & (keep < start + len(weight))])
        wanted, bias = _with_bias(dense, name)
        written = x[:, : wanted.shape[1]] @ wanted[kept].T
        read = read[:, : small[0].numel() + (bias is not None)]
        cross, moment = cross + written.T @ read, moment + read.T @ read
    whole = _with_bias(sliced, name)[0]
    here = slice(own[1], own[1] + len(small))
    whole[here] = refit(whole[here], (cross - whole[here] @ moment) / len(batches), moment / len(batches))
    _write(sliced, name, whole)


def refit(weight: Tensor, missing: Tensor, moment: Tensor) -> Tensor:
    """The least-squares weights near some weights.

    Args:
        weight: [out, in], what a small ridge pulls to.
        missing: [out, in], the mean of ``e x^T`` over what these weights write too little and what the layer reads.
        moment: [in, in], the mean of ``x x^T``.

    Raises:
        InputError: a moment is not finite.
    """
    if not moment.numel():
        return weight
    if not (moment.isfinite().all() and missing.isfinite().all()):
        raise InputError("what a layer reads or writes is not finite; check the model's weights and the images")
    ridge, identity = _RIDGE * moment.diagonal().mean(), torch.eye(len(moment), dtype=moment.dtype)
    while True:
        root, failed = torch.linalg.cholesky_ex(moment + ridge * identity)
        if not failed:
            return weight + torch.cholesky_solve(missing.T, root).T
        ridge = 10 * ridge  # moments are sums of float32 products: a nearly singular one may not be positive


def readers(space: DimensionSpace) -> list[str]:
    """The weights whose inputs are heads, v or mlp units and nothing else, not behind a norm over them."""
    found = []
    for name, place in space.places.items():
        if name in space.trace.positions and len(place.axes) > 1:  # of a layer, not a table
            read = [space.dimensions[n] for n in names(place.axes[1])]
            if read and {d.kind for d in read} <= {"heads", "v", "mlp", "channels"} and not any(d.normed for d in read):
                found.append(name)
    return found


def _with_bias(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """A layer's weight as float64 [out, in (+ 1)] on the CPU, the bias as its last column, and the bias itself.

    A transposed convolution has a row for each output at each entry of its kernel. They share a bias, which so is left
    out: it stays what it is.
    """
    owner, _, leaf = name.rpartition(".")
    bias = getattr(model.get_submodule(owner), leaf.replace("weight", "bias"), None)
    weight = model.get_parameter(name).detach().double().cpu()
    if _is_transposed(model, name):
        return weight.flatten(1).T, None
    weight = weight.flatten(1)
    if bias is None:
        return weight, None
    return torch.cat([weight, bias.detach().double().cpu()[:, None]], 1), bias


def _is_transposed(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name.rpartition(".")[0]), "transposed", False)


def _write(model: nn.Module, name: str, whole: Tensor) -> None:
    """Give a layer the weight, and the bias if it has one, that ``_with_bias`` would read."""
    weight, bias = model.get_parameter(name), _with_bias(model, name)[1]
    if _is_transposed(model, name):
        weight.copy_(whole.T.reshape(weight.shape))
        return
    columns = weight[0].numel()
    weight.copy_(whole[:, :columns].reshape(weight.shape))
    if bias is not None:
        bias.copy_(whole[:, -1])
