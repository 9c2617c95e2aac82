"""Repair of linear layers that lost entries: what is left is fitted, by least squares, to what the layer gave.

It is the repair of slices (:mod:`sidt.surgery.compensation`) for masks: for each output with kept inputs K,
``w' = w G[:, K] (G[K, K] + eps I)^-1``, where ``G = X^T X`` over calibration inputs with a constant appended.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.training.evaluation import evaluating

_EPS = 1e-6  # of the mean of G's diagonal


@torch.no_grad()
def input_moments(model: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean second moments of what linear layers read, with the constant 1 appended: float64 [in + 1, in + 1].

    Args:
        model: run in eval mode and not changed.
        names: of weights; those of convolutions are left out.
        batches: (images, targets).

    Raises:
        InputError: there is no batch.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).double()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        sums[name] = sums.get(name, 0) + rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    handles = [
        layer.register_forward_pre_hook(partial(note, name))
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with evaluating(model):
            for images, _ in batches:
                model(images.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    if handles and not sums:
        raise InputError("there is no calibration image; give at least one")
    return {name: (total / counts[name]).cpu() for name, total in sums.items()}


def input_scale(moments: Tensor) -> Tensor:
    """The root mean square of each input, [in]; float64."""
    return moments.diagonal()[:-1].sqrt()


@torch.no_grad()
def refit(model: nn.Module, masks: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    """Fit what masks leave of linear layers to what the whole layers gave, in place; biases too.

    On the calibration inputs the squared error of a layer is never above that of masking alone.

    Args:
        model: the model with its whole weights.
        masks: by the names of weights, bool [out, in].
        moments: of some of them; see :func:`input_moments`. Weights without any are masked alone.
    """
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        if mask.all():
            continue
        if name not in moments:
            weight.mul_(mask.to(weight.device))
            continue
        layer, gram = model.get_submodule(name.rpartition(".")[0]), moments[name]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        whole = torch.cat([weight.double().cpu(), _column(bias, len(weight))], 1)
        rows, which = mask.cpu().unique(dim=0, return_inverse=True)
        for i, row in enumerate(rows):
            kept = row.nonzero()[:, 0]
            if bias is not None:  # the constant is read as well
                kept = torch.cat([kept, kept.new_tensor([len(row)])])
            here = which == i
            fitted = torch.zeros_like(whole[here])
            if len(kept):
                square = gram[kept][:, kept]
                square = square + _EPS * square.diagonal().mean() * torch.eye(len(kept), dtype=square.dtype)
                fitted[:, kept] = torch.linalg.solve(square, gram[kept] @ whole[here].T).T
            whole[here] = fitted
        weight.copy_(whole[:, :-1])
        if bias is not None:
            bias.copy_(whole[:, -1])


def _column(bias: Tensor | None, rows: int) -> Tensor:
    return torch.zeros(rows, 1, dtype=torch.float64) if bias is None else bias.double().cpu()[:, None]
