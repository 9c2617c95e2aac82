"""Focal losses and their gradients. ``weight`` holds a factor for each class, or nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sidt.detection.operators.precision import wide

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]

TINY = torch.finfo(torch.float32).tiny  # mmcv takes logarithms of nothing smaller


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` with ``-alpha (1 - p)^gamma log p`` at the target, ``-(1 - alpha) p^gamma log(1 - p)`` elsewhere.

    Args:
        input: logits [N, C]; p is their sigmoid.
        target: classes [N]; C is the background.
        weight: [C] or empty; the background counts 1.
        output: [N, C].
        gamma: how little an easy example counts.
        alpha: the share of the targets.
    """
    x = wide(input)
    p, rest = x.sigmoid(), (-x).sigmoid()
    positive = alpha * rest**gamma * F.logsigmoid(x)
    negative = (1 - alpha) * p**gamma * F.logsigmoid(-x)
    output.copy_(-torch.where(_is_target(x, target), positive, negative) * _factors(weight, target))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` [N, C] with the gradients of :func:`sigmoid_focal_loss_forward`, each of its own element."""
    x = wide(input)
    p, rest = x.sigmoid(), (-x).sigmoid()
    positive = alpha * rest**gamma * (rest - gamma * p * F.logsigmoid(x))
    negative = (1 - alpha) * p**gamma * (gamma * rest * F.logsigmoid(-x) - p)
    grad_input.copy_(-torch.where(_is_target(x, target), positive, negative) * _factors(weight, target))


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` [N] with ``-alpha (1 - p)^gamma log p``, where p is the target's probability.

    Args:
        softmax: probabilities [N, C].
        target: classes [N]; a negative one has no loss.
        weight: [C] or empty.
        output: [N].
        gamma: how little an easy example counts.
        alpha: a factor.
    """
    p = _of_target(wide(softmax), target)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=TINY).log()
    output.copy_(torch.where(target >= 0, loss * _factors(weight, target)[:, 0], 0.0))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` [N, C] with the gradients of :func:`softmax_focal_loss_forward` by the logits.

    ``buff`` [N] gets p times the derivative by p.
    """
    probabilities = wide(softmax)
    p = _of_target(probabilities, target)
    rest = (1 - p).clamp(min=TINY)  # its power may be negative, and log p is 0 there
    slope = alpha * (gamma * rest ** (gamma - 1) * p * p.clamp(min=TINY).log() - (1 - p) ** gamma)
    slope = torch.where(target >= 0, slope * _factors(weight, target)[:, 0], 0.0)
    buff.copy_(slope)
    grad_input.copy_(slope[:, None] * (_is_target(probabilities, target).to(slope) - probabilities))


def _is_target(x: Tensor, target: Tensor) -> Tensor:
    """[N, C], true where the column is the row's target."""
    return target[:, None] == torch.arange(x.shape[1], device=x.device)


def _of_target(probabilities: Tensor, target: Tensor) -> Tensor:
    return probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]


def _factors(weight: Tensor, target: Tensor) -> Tensor:
    """[N, 1], the factor of the target's class; 1 where it has none."""
    factors = torch.cat([wide(weight), wide(weight).new_ones(1)])
    known = (target >= 0) & (target < len(weight))
    return factors[torch.where(known, target, len(weight))][:, None]
