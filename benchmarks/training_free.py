"""CORP and VBP: rivals that train nothing either, made here from their published formulas.

Neither needs a label. Both keep the basis that the model came in and fold what they repair into the weights, so that a
plain timm model is left. CORP (arXiv 2602.05243) prunes MLP units and q/k and predicts what is lost from what is kept;
VBP (arXiv 2507.12988) prunes MLP units and keeps the mean of what is lost.

Moments are means over the positions of all images. S are the kept units and P the pruned ones of a dimension;
``X[S, P]`` is a block of X.
"""

import copy
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest

import numpy as np
import numpy.typing as npt
import torch
from cells import Method, RivalError, Setting
from torch import Tensor, nn

from sidt.cost.complexity import PlanCosts
from sidt.space.axes import Array, views
from sidt.space.plan import DimensionPlan
from sidt.space.space import Dimension, DimensionSpace, space_for
from sidt.surgery.compensation import readers
from sidt.surgery.heads import with_head
from sidt.surgery.moments import Moments, Rows, measure_moments, watching
from sidt.surgery.rotation import fold_norms
from sidt.surgery.slicing import is_bilinear, slice_model

RIDGE = 1e-3  # CORP's least ridge on covariances
# Its ridge on the products of moments of q and k, in units of their mean: no number for it is known to us. On held-out
# images of CIFAR-100's ViT 1e-8 to 1e-4 are alike, and 1e-2 is worse where most of q/k goes.
LOGIT_RIDGE = 1e-6
STEPS = 4096  # of CORP's ratio between all and nothing
Stretch = tuple[str, int, int]  # a parameter, and the first and the end of some of its rows


# --- VBP --------------------------------------------------------------------------------------------------------------


def vbp(setting: Setting) -> Method:
    """Variance-based pruning: the MLP units that vary least over the images go, and their mean stays.

    The score of a unit is the variance of its activation (after the GELU) over all positions. Our reading of its
    ranking: one for all layers, by the variance as it is, so that layers lose as much as they hold of what varies
    little; as many units go as the target asks for, whatever each costs, and every MLP keeps its best one. The mean of
    what goes is folded into the next layer: ``b2 += W2[:, P] mu[P]``.

    Raises:
        RivalError: the MLPs are too small a part of the model.
    """
    space = setting.space
    moments = measure_moments(setting.dense, setting.calibration(), space=space)
    variances = {name: centred(moments, reader)[1].diagonal().numpy() for name, reader in mlps(space).items()}
    dropped, kept = fewest(setting, *by_variance(variances))
    model = copy.deepcopy(setting.dense)
    for name, reader in mlps(space).items():
        fold(model, reader, kept[name], centred(moments, reader)[0])
    return slice_model(model, DimensionPlan(space, kept)), {"dropped": dropped}


def by_variance(
    variances: dict[str, npt.NDArray[np.float64]],
) -> tuple[int, Callable[[int], dict[str, Array]]]:
    """How many units can go, and what is kept when so many have gone.

    Args:
        variances: of the units of every MLP, [units].
    """
    order = {name: np.argsort(values, kind="stable") for name, values in variances.items()}
    can_go = sorted((variances[name][unit], name) for name, units in order.items() for unit in units[:-1])

    def keep(dropped: int) -> dict[str, Array]:
        gone = Counter(name for _, name in can_go[:dropped])
        return {name: units[gone[name] :] for name, units in order.items()}

    return len(can_go), keep


# --- CORP -------------------------------------------------------------------------------------------------------------


def corp(setting: Setting) -> Method:
    """CORP: MLP units and q/k of every layer by one ratio, what is lost predicted from what is kept.

    Our readings. The score of an MLP unit is ``E[x^2]``, x its activation, times the share of positions where x > 0.
    That of a q/k unit is the energy of what it adds to the logits, ``E[q^2] E[k^2]``; every head keeps as many, of its
    own. MLP and q/k have the same ratio, the largest that meets the target.

    Raises:
        RivalError: MLPs and q/k are too small a part of the model.
    """
    space = setting.space
    moments = measure_moments(setting.dense, setting.calibration(), space=space)
    active, positions = activity(setting)
    logits = logit_moments(setting.dense, moments)
    order = {}
    for name, reader in mlps(space).items():
        energy = moments.read_by(reader).diagonal()[:-1]
        order[name] = (energy * active[reader]).argsort(descending=True, stable=True).numpy()
    for name, (q, k) in logits.items():
        energy = q.diagonal(dim1=1, dim2=2) * k.diagonal(dim1=1, dim2=2)
        order[name] = energy.argsort(descending=True, stable=True).numpy()

    def keep(step: int) -> dict[str, Array]:
        return {n: units[..., : max(1, units.shape[-1] * (STEPS - step) // STEPS)] for n, units in order.items()}

    step, kept = fewest(setting, STEPS, keep)
    model = copy.deepcopy(setting.dense)
    for name, reader in mlps(space).items():
        mean, covariance = centred(moments, reader)
        fold(model, reader, kept[name], mean, prediction(covariance, kept[name], positions[reader]))
    for name, (q, k) in logits.items():
        compensate_logits(model, space, name, kept[name], q, k)
    return slice_model(model, DimensionPlan(space, kept)), {"ratio": 1 - step / STEPS}


def activity(setting: Setting) -> tuple[dict[str, Tensor], dict[str, int]]:
    """For the reader of every MLP: the share of positions where each input is above 0, and the number of positions."""
    above: dict[str, Tensor] = {}
    positions: dict[str, int] = {}

    def see(read_by: Rows, x: Tensor, _: Tensor) -> None:
        reader, _first = read_by
        above[reader] = above.get(reader, torch.zeros(())) + (x > 0).sum(0)
        positions[reader] = positions.get(reader, 0) + len(x)

    with torch.no_grad(), watching(setting.dense, mlps(setting.space).values(), see):
        for images, _ in setting.calibration():
            setting.dense(images)
    return {name: count.double() / positions[name] for name, count in above.items()}, positions


def oas(covariance: Tensor, samples: int) -> float:
    """The Oracle Approximating Shrinkage of a covariance [p, p] (Chen, Wiesel, Eldar, Hero 2010, equation 23)."""
    size = len(covariance)
    square, trace = float((covariance**2).sum()), float(covariance.trace())
    below = (samples + 1 - 2 / size) * (square - trace**2 / size)
    above = (1 - 2 / size) * square + trace**2
    return 1.0 if above >= below else above / below


def prediction(covariance: Tensor, kept: Array, samples: int) -> Tensor:
    """``B = C[P, S] (C[S, S] + l I)^-1`` [pruned, kept] with ``l = max(1e-3, rho tr C[S, S] / p)``, rho by OAS.

    Args:
        covariance: C, [units, units].
        kept: S, in order.
        samples: positions that the covariance is of.
    """
    pruned = others(kept, len(covariance))
    within = covariance[kept][:, kept]
    ridge = max(RIDGE, oas(within, samples) * float(within.trace()) / len(within))
    share: Tensor = torch.linalg.solve(
        within + ridge * torch.eye(len(within)).to(within), covariance[kept][:, pruned]
    ).T
    return share


def logit_moments(model: nn.Module, moments: Moments) -> dict[str, tuple[Tensor, Tensor]]:
    """``E[q q^T]`` and ``E[k k^T]``, [heads, size, size], of every q/k dimension that CORP can prune."""
    headed, space = with_head(model, space_for(model, moments.space.trace.input_size))  # as the moments are measured
    folded = copy.deepcopy(headed)
    fold_norms(folded, space)  # the moments are of what the norms give without scale and shift

    def moment_of(name: str, weight: Stretch, bias: Stretch | None) -> Tensor:
        parts = [per_head(folded, stretch, space, name).double() for stretch in (weight, bias) if stretch is not None]
        whole, read = torch.cat(parts, 2), moments.read_by(*weight[:2])
        return whole @ read[: whole.shape[2], : whole.shape[2]] @ whole.mT

    found = {}
    for name in attentions(model, space):
        weights, biases = writers(space, name)
        q, k = (moment_of(name, *stretches) for stretches in zip_longest(weights, biases))
        found[name] = (q, k)
    return found


def compensate_logits(model: nn.Module, space: DimensionSpace, name: str, kept: Array, q: Tensor, k: Tensor) -> None:
    """Change the kept q/k units, in place, so that their logits stand for those of all: ``q[S]^T (I + M) k[S]``.

    With ``I + M = U s V^T``, q becomes ``s^1/2 U^T q`` and k ``s^1/2 V^T k``. The scale is a factor of all logits, and
    slices keep that of the dense model.

    Args:
        model: the dense model, whose norms need not be folded.
        space: its space.
        name: the q/k dimension.
        kept: S, in order, [heads, kept].
        q: ``E[q q^T]``, [heads, size, size].
        k: the same of k.
    """
    weights, biases = writers(space, name)
    for head, own in enumerate(kept):
        whole = torch.eye(len(own), dtype=q.dtype) + lost_logits(q[head], k[head], own)
        left, values, right = torch.linalg.svd(whole)
        root = values.sqrt()[:, None]
        for sites in (weights, biases):
            for site, change in zip(sites, (root * left.T, root * right), strict=bool(sites)):
                units = per_head(model, site, space, name)[head]
                units[own] = (change @ units[own].double()).to(units)


def lost_logits(q: Tensor, k: Tensor, kept: Array) -> Tensor:
    """M [kept, kept], so that ``q[S]^T M k[S]`` is the best fit to ``q[P]^T k[P]`` over all pairs of a query and a key.

    ``G_Q M G_K + l M = C_Q C_K`` with ``G_Q = E[q[S] q[S]^T]``, ``C_Q = E[q[S] q[P]^T]``, ``C_K = E[k[P] k[S]^T]``.
    The moments are of all images together, so the pairs are not of one image alone.

    Args:
        q: ``E[q q^T]`` of a head, [size, size].
        k: the same of k.
        kept: S, in order.
    """
    pruned = others(kept, len(q))
    within_q, within_k = q[kept][:, kept], k[kept][:, kept]
    ridge = LOGIT_RIDGE * float(within_q.trace() * within_k.trace()) / len(kept) ** 2
    return solve(within_q, within_k, q[kept][:, pruned] @ k[pruned][:, kept], ridge)


def solve(left: Tensor, right: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """M with ``left M right + ridge M = cross``, all [n, n], left and right symmetric."""
    (values, basis), (right_values, right_basis) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    inside = basis.T @ cross @ right_basis / (torch.outer(values, right_values) + ridge)
    found: Tensor = basis @ inside @ right_basis.T
    return found


# --- what both need ---------------------------------------------------------------------------------------------------


def mlps(space: DimensionSpace) -> dict[str, str]:
    """The MLP dimensions that can shrink, and the weight that reads each."""
    found = {}
    for reader in readers(space):
        axis = space.places[reader].axes[1]
        name = axis[0][0]
        if len(axis) == 1 and len(axis[0]) == 1 and isinstance(name, str) and _shrinks(space.dimensions[name], "mlp"):
            found[name] = reader
    return found


def attentions(model: nn.Module, space: DimensionSpace) -> list[str]:
    """The q/k dimensions that can shrink and whose logits are products of q and k."""
    found = []
    for name, dimension in space.dimensions.items():
        if _shrinks(dimension, "qk") and dimension.per is not None:
            owner = model.get_submodule(space.attention[dimension.per])
            if is_bilinear(owner, space.forwards) and len(writers(space, name)[0]) == 2:
                found.append(name)
    return found


def _shrinks(dimension: Dimension, kind: str) -> bool:
    return dimension.kind == kind and not dimension.fixed and dimension.size > 0


def writers(space: DimensionSpace, name: str) -> tuple[list[Stretch], list[Stretch]]:
    """The rows of all heads that write a q/k dimension, q before k: of weights, and of biases."""
    found: tuple[list[Stretch], list[Stretch]] = ([], [])
    for parameter, place in space.places.items():
        for at, *_ in views(place.axes[0], space.sizes, name, space.per):
            found[len(place.axes) == 1].append((parameter, at[0], at[-1] + 1))
    return found


def per_head(model: nn.Module, stretch: Stretch, space: DimensionSpace, name: str) -> Tensor:
    """A view of a stretch, [heads, size, columns]; a bias has one column."""
    parameter, start, end = stretch
    own = model.get_parameter(parameter).detach()[start:end]
    return own.view(-1, space.sizes[name], own[0].numel())


def centred(moments: Moments, reader: str) -> tuple[Tensor, Tensor]:
    """Mean [units] and covariance [units, units] of what a weight reads."""
    moment = moments.read_by(reader)
    mean = moment[-1, :-1]
    return mean, moment[:-1, :-1] - torch.outer(mean, mean)


def others(kept: Array, size: int) -> Array:
    """The units that are not kept, in order."""
    return np.setdiff1d(np.arange(size), kept)


def fold(model: nn.Module, reader: str, kept: Array, means: Tensor, share: Tensor | None = None) -> None:
    """Give a layer, in place, what it would read from the pruned units: what is predicted from the kept ones.

    ``W[:, S] += W[:, P] B`` and ``b += W[:, P] (mu[P] - B mu[S])``.

    Args:
        model: the dense model.
        reader: the weight of the layer.
        kept: S, in order.
        means: mu, [units].
        share: B, [pruned, kept]; without it 0, which leaves the means.
    """
    weight, bias = model.get_parameter(reader).detach(), model.get_parameter(reader.removesuffix("weight") + "bias")
    whole = weight.double().flatten(1)
    pruned = others(kept, whole.shape[1])
    away, constant = whole[:, pruned], means[pruned]
    if share is not None:
        constant = constant - share @ means[kept]
        whole[:, kept] += away @ share
    weight.copy_(whole.view_as(weight))
    bias.detach().add_((away @ constant).to(bias))


def fewest(setting: Setting, steps: int, keep: Callable[[int], dict[str, Array]]) -> tuple[int, dict[str, Array]]:
    """The fewest steps that meet the target, and the units that are kept after them, in order.

    Args:
        setting: what has the target.
        steps: how many there are.
        keep: the kept units after a number of steps, in any order; more steps cost no more.

    Raises:
        RivalError: all steps do not meet it; it says what would be left.
    """
    space, costs, limit = setting.space, PlanCosts(setting.space), setting.limit
    column = ("params", "macs").index(setting.kind)

    def cost(step: int) -> int:
        sizes = {**space.sizes, **{name: units.shape[-1] for name, units in keep(step).items()}}
        return int(costs.of(np.array([sizes[name] for name in costs.names]))[column])

    step = bisect_left(range(steps + 1), True, key=lambda step: cost(step) <= limit)
    if step > steps:
        share = cost(steps) / int(costs.dense[column])
        raise RivalError(f"cannot reach it: its smallest model keeps {share:.2%} of the {setting.kind}")
    return step, {name: np.sort(units) for name, units in keep(step).items()}
