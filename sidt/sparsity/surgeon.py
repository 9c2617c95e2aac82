"""Optimal Brain Surgeon on tiles: which of them a model can spare, by what a refit of the others cannot make up for.

Without a tile t the outputs r of its row, refitted by least squares on the inputs that they still read, lose::

    cost = sum over r of F[r] w[r, t] H[t, t]^-1 w[r, t]^T,    H = (G + eps I)^-1

with G the second moments of the layer's inputs (a constant is appended, for the bias) and F[r] the Fisher information
of an output: the mean square of the gradient there of the distance to the model's own answers. Then they are::

    w[r] -= w[r, t] H[t, t]^-1 H[t, :],    H -= H[:, t] H[t, t]^-1 H[t, :]

(Hassibi and Stork 1993; on blocks Kurtic et al. 2022.) Every row of tiles is emptied like this, the cheapest tile
first. Of all rows of all weights of a structure the cheapest tiles go, in the order of their row, where a tile costs no
less than those before it. So weights keep different shares, and Fisher information makes their losses comparable.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sidt.errors import InputError
from sidt.importance.criteria import Loss
from sidt.sparsity.holding import weights_of
from sidt.sparsity.patterns import Largest, kept_of
from sidt.sparsity.structures import Structure
from sidt.sparsity.tiles import Tiles
from sidt.training.evaluation import evaluating

_RIDGE = 1e-4  # of the mean of G's diagonal
_BYTES = 2**28  # of the matrices H that are worked on at a time


def check_surgeon(model: nn.Module, structures: Mapping[str, Structure]) -> None:
    """Check that structures are tiles of linear layers.

    Raises:
        InputError: one is not.
    """
    for name, structure in structures.items():
        if len(structure.patterns) != 1 or not isinstance(structure.patterns[0], Largest):
            raise InputError(f"reach.by: surgeon is for one pattern, of tiles, and {name} has another; use by: admm")
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
            raise InputError(f"reach.by: surgeon is for linear layers, and {name} is none; use by: admm for it")


def output_fisher(model: nn.Module, names: Iterable[str], batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """The mean over images of the squared gradients at the outputs of linear layers, summed over positions: [out].

    Args:
        model: run in eval mode and not changed.
        names: of the weights.
        batches: (images, targets).
        loss: the mean loss of a batch; :func:`sidt.importance.own_outputs` makes it the Fisher information.

    Returns:
        By name, float64 on the CPU; none of a layer that is not run.

    Raises:
        InputError: there is no batch, or the loss is not finite.
    """
    weights = {name: model.get_parameter(name) for name in names}
    sums: dict[str, Tensor] = {}
    size = images = 0

    def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        def see(gradient: Tensor) -> None:  # of the mean over the batch
            squares = (size * gradient.float()).square().flatten(0, -2).sum(0).double().cpu()
            sums[name] = sums[name] + squares if name in sums else squares

        output.register_hook(see)

    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(partial(note, name)) for name in weights
    ]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad(), evaluating(model):
            for batch in batches:
                size = len(batch[0])
                value = loss(model, batch)
                if not torch.isfinite(value):
                    raise InputError(f"the loss is {value.item()} after {images} images; check the model and the data")
                torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                images += size
    finally:
        for handle in handles:
            handle.remove()
        for weight in frozen:
            weight.requires_grad_(False)
    if not images:
        raise InputError("there is no calibration image; give at least one")
    return {name: total / images for name, total in sums.items()}


@torch.no_grad()
def surgeon_masks(
    model: nn.Module,
    structures: Mapping[str, Structure],
    moments: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Which tiles stay: of the weights that have the same structure, together, the share that it keeps.

    Args:
        model: the model with its whole weights.
        structures: by the names of weights; each of one pattern, tiles.
        moments: see :func:`sidt.sparsity.input_moments`, which belong to the same model.
        fisher: see :func:`sidt.sparsity.output_fisher`.

    Returns:
        Masks, bool [out, in], for :func:`sidt.sparsity.refit`.

    Raises:
        InputError: a structure is no tiles, or of a layer that is not linear or was not run.
    """
    check_surgeon(model, structures)
    weights, masks = weights_of(model, structures), dict[str, Tensor]()
    if missing := [name for name in structures if name not in moments or name not in fisher]:
        raise InputError(f"reach.by: surgeon needs what {missing[0]} reads, which no image went through; leave it out")
    emptied = {}
    for name, structure in tqdm(structures.items(), desc="tiles"):
        bias: Tensor | None = model.get_submodule(name.rpartition(".")[0]).bias  # type: ignore[assignment]
        own = weights[name].cpu(), None if bias is None else bias.cpu(), moments[name], fisher[name]
        emptied[name] = emptied_rows(*own, _pattern(structure).tiles)
    for structure in dict.fromkeys(structures.values()):
        mine = {name: emptied[name] for name, other in structures.items() if other == structure}
        costs = torch.cat([costs.cummax(1).values.flatten() for costs, _ in mine.values()])
        stay = torch.zeros(len(costs), dtype=torch.bool)
        stay[costs.argsort(stable=True)[-kept_of(_pattern(structure).keep, len(costs)) :]] = True
        for (name, (_, order)), kept in zip(
            mine.items(), stay.split([order.numel() for _, order in mine.values()]), strict=True
        ):
            chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, kept.view_as(order))
            masks[name] = _pattern(structure).tiles.spread(chosen, weights[name])
    return masks


def emptied_rows(
    weight: Tensor, bias: Tensor | None, moments: Tensor, fisher: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """What each tile of each row costs when the row is emptied, the cheapest first.

    Args:
        weight: [out, in].
        bias: [out]; without one, nothing can make up for a mean.
        moments: [in + 1, in + 1], float64.
        fisher: [out], float64.
        tiles: the grid.

    Returns:
        The costs, in the order in which the tiles of a row go, and which these are: both [grid rows, grid columns].
    """
    grid = tiles.split(weight.double())[..., 0]  # [grid rows, grid columns, rows, columns]
    down, across, rows, columns = grid.shape
    short = across * columns - weight.shape[1]
    beyond = (0, down * rows - len(weight))  # what is cut off has weights of 0
    moments = moments.roll((1, 1), (0, 1))  # the constant first
    if bias is None:
        moments[0, 1:] = moments[1:, 0] = 0.0
    whole = torch.block_diag(moments, torch.eye(short, dtype=moments.dtype))
    whole = whole + _RIDGE * moments.diagonal().mean() * torch.eye(len(whole), dtype=whole.dtype)
    inverse = torch.linalg.inv(whole)
    constant = nn.functional.pad(weight.new_zeros(len(weight)) if bias is None else bias, beyond).view(down, 1, rows)
    w = torch.cat([constant.double(), grid.transpose(2, 3).flatten(1, 2)], 1)  # [grid rows, inputs + 1, rows]
    f = nn.functional.pad(fisher, beyond).view(down, rows)
    together = max(1, _BYTES // (8 * inverse.numel()))
    parts = [
        _emptied(part, inverse.repeat(len(part), 1, 1), counts, columns)
        for part, counts in zip(w.split(together), f.split(together), strict=True)
    ]
    return torch.cat([costs for costs, _ in parts]), torch.cat([order for _, order in parts])


def _emptied(w: Tensor, h: Tensor, f: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The same for rows w, [rows of tiles, 1 + inputs, outputs], each with its H, in place: what is gone comes last."""
    down, across = len(w), (w.shape[1] - 1) // columns
    left, each = torch.arange(across).repeat(down, 1), torch.arange(down)[:, None]
    costs, order = torch.empty(down, across, dtype=w.dtype), torch.empty(down, across, dtype=torch.long)
    for step in range(across):
        count = across - step
        end = 1 + (count - 1) * columns
        blocks = h[:, 1:, 1:].unflatten(2, (count, columns)).unflatten(1, (count, columns))
        blocks = blocks.diagonal(dim1=1, dim2=3).movedim(3, 1)  # [down, count, columns, columns]
        entries = w[:, 1:].unflatten(1, (count, columns))
        prices = ((entries * torch.linalg.solve(blocks, entries)).sum(2) * f[:, None]).sum(2)
        costs[:, step], which = prices.min(1)
        order[:, step] = left[each[:, 0], which]
        tile = 1 + which[:, None] * columns + torch.arange(columns)  # [down, columns]
        read = h[each, tile]  # H[t, :]
        solved = torch.linalg.solve(read[each, :, tile], torch.cat([read, w[each, tile]], 2))
        h -= read.mT @ solved[..., : h.shape[2]]
        w -= read.mT @ solved[..., h.shape[2] :]
        left[each[:, 0], which] = left[:, count - 1].clone()
        h[each, tile] = h[:, end:].clone()
        h[each, :, tile] = h[:, :, end:].mT.clone()
        w[each, tile] = w[:, end:].clone()
        h, w = h[:, :end, :end], w[:, :end]
    return costs, order


def _pattern(structure: Structure) -> Largest:
    (pattern,) = structure.patterns
    assert isinstance(pattern, Largest)
    return pattern
