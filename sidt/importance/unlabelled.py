"""Scores without labels: by how far a model's own outputs would move."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidt.importance.criteria import Loss
from sidt.space.outputs import heads_of


def own_outputs(*, features: bool, seed: int = 0) -> Loss:
    """The loss for :func:`sidt.importance.taylor` that needs no labels.

    The distance to the model's own outputs is least at the model itself, so it has no gradient there; its second-order
    change is the mean square of other gradients. For logits, with the divergence KL(own || changed) as the distance,
    they are those of the cross-entropy with labels drawn from the model's own answers: the Fisher information (Martens
    2020), which the empirical one takes for labels that are given. For features, with the squared error relative to
    their length, they are those of products with random directions (Hutchinson's estimate of a trace). Either is drawn
    anew for every image, so that what groups of images share is zero in the mean.

    Args:
        features: whether the outputs are features; else they are logits.
        seed: of what is drawn; every call of the loss draws more.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images = batch[0].to(next(model.parameters()).device)
        out = torch.stack(heads_of(model(images))).mean(0)
        if features:
            directions = torch.randn(out.shape, generator=generator).to(out)
            lengths = out.detach().flatten(1).norm(dim=1).clamp(min=torch.finfo(out.dtype).tiny)
            along: Tensor = ((directions * out).flatten(1).sum(1) / lengths).mean()
            return along
        answers = torch.multinomial(out.detach().float().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return F.cross_entropy(out, answers.to(out.device))

    return loss
