"""One call from a trained model, images and a budget to the small model: align, score, allocate, repair."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sidt.allocation.greedy import Rules, allocate
from sidt.allocation.steps import MOST, Slicer, before_last, steps_for
from sidt.allocation.timing import measure_layers
from sidt.cost.budget import Budget
from sidt.cost.complexity import ComplexityReport, report
from sidt.cost.latency import LayerLatencies
from sidt.errors import InputError
from sidt.importance.criteria import Loss, cross_entropy, taylor
from sidt.importance.scores import Importance
from sidt.importance.unlabelled import own_outputs
from sidt.space.outputs import classes_of, heads_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.space.trace import InputSize
from sidt.surgery.alignment import align
from sidt.surgery.compensation import compensate
from sidt.surgery.moments import measure_moments, run_images
from sidt.training.evaluation import distances, evaluating


@dataclass(frozen=True, eq=False)
class ShrinkResult:
    """A small model, and what it cost.

    Attributes:
        model: the small model; its ``sidt_plan`` is ``plan``.
        plan: what is left of the dense model.
        dense: the dense model's complexity.
        report: the small model's.
        loss: the mean loss on the calibration images: the dense model's and the small one's. Without labels and without
            a loss of one's own, it is the distance to the dense model's outputs, which is 0 for the dense model: the
            divergence of the answers, or the squared error of the features relative to their length.
        agreement: of the calibration images, the part for which both models' first choices are the same; ``None``
            where the outputs are features, or anything but one image's logits.
    """

    model: nn.Module
    plan: DimensionPlan
    dense: ComplexityReport
    report: ComplexityReport
    loss: tuple[float, float]
    agreement: float | None

    def __str__(self) -> str:
        """What is left and what was lost, in one line."""
        params, macs = self.report.params, self.report.macs
        same = "" if self.agreement is None else f", the same first choice on {self.agreement:.1%} of them"
        return (
            f"{params:,} of {self.dense.params:,} parameters ({params / self.dense.params:.1%}), {macs:,} of "
            f"{self.dense.macs:,} multiply-adds ({macs / self.dense.macs:.1%}); loss on the calibration images "
            f"{self.loss[0]:.4f} before, {self.loss[1]:.4f} after{same}"
        )


def shrink(
    model: nn.Module,
    batches: Iterable[Any],
    budget: Budget,
    *,
    loss: Loss | None = None,
    steps: int | None = None,
    rules: Rules | None = None,
    input_size: InputSize | None = None,
    progress: bool = True,
) -> ShrinkResult:
    """Shrink a trained model to a budget, without training: align, score, allocate and repair.

    ``sidt.search`` finds a better allocation by trials, and ``sidt.finetune`` trains on.

    Args:
        model: a trained model that has a search space; it is not changed, and stays on its device.
        batches: calibration images, a thousand or so: (images, labels); images alone, which need no labels; or
            whatever ``loss`` takes. They are gone through several times.
        budget: what may be left.
        loss: (model, batch) -> the mean loss of a batch; default: the cross-entropy with the labels; without labels, or
            if the model has no head (``num_classes`` 0), the distance to the dense model's own outputs.
        steps: in how many slices, each aligned and scored anew; default: 4 where little is left, else 1.
        rules: which dimensions may shrink, and how.
        input_size: channels, height and width that multiply-adds are of; default: what the images of the first batch
            have.
        progress: whether to show progress bars.

    Raises:
        InputError: there is no batch, the budget cannot be met, the model has no search space, or steps is out of
            range.
    """
    if steps is not None and not 1 <= steps <= MOST:
        raise InputError(f"steps is {steps}; it must be from 1 to {MOST}")
    kept = list(batches) if iter(batches) is batches else batches  # an iterator is used up by one pass
    first = next(iter(kept), None)
    if first is None:
        raise InputError("shrink got no batch; give at least one")
    pairs, labelled = _is_pair(first), False
    if isinstance(first, Tensor):
        kept, pairs = _Paired(kept), True
        first = next(iter(kept))
    elif pairs:
        labelled = not first[1].is_floating_point() and bool((first[1] >= 0).all())
    if loss is None and not pairs:
        raise InputError(
            f"shrink got batches of {type(first).__name__}; give images, (images, labels), or a loss= that takes them"
        )
    features = classes_of(model) == 0
    own = loss is None and (features or not labelled)
    of = loss or (own_outputs(features=features) if own else cross_entropy)
    forward = run_images if pairs else of
    if input_size is None and pairs:
        input_size = tuple(first[0].shape[1:])
    count, done = steps or steps_for(budget), 0

    def shown(what: str) -> Iterable[Any]:
        return tqdm(kept, desc=what if count == 1 else f"{what}, step {done} of {count}", disable=not progress)

    def prepare(now: nn.Module) -> tuple[nn.Module, Importance, Slicer]:
        nonlocal done
        done += 1
        space = space_for(now, input_size)
        aligned, moments = align(now, measure_moments(now, shown("moments"), forward=forward, space=space))
        scores = taylor(aligned, shown("scores"), of, space=moments.space)
        return aligned, scores, lambda plan: compensate(aligned, plan, moments)

    def timed(base: nn.Module, scores: Importance, limits: Budget) -> LayerLatencies | None:
        return None if limits.latency is None else measure_layers(base, scores.space, progress=progress)

    start, limits = before_last(model, budget, count, prepare, rules=rules, timed=timed)
    base, scores, slicer = prepare(start)
    latencies = timed(base, scores, limits)
    plan = allocate(scores, limits, **asdict(rules or Rules()), latencies=latencies)
    small = slicer(plan).train(model.training)
    earlier: DimensionPlan | None = getattr(base, "sidt_plan", None)
    whole = plan if earlier is None else earlier.then(plan)
    dense = report(space_for(model, input_size))
    lost: tuple[tuple[float, float], float | None]
    with evaluating(model, small):
        if pairs:
            lost = _lost(model, small, shown("check"), None if own else of, features)
        else:
            lost = _loss_of(model, small, kept, of)
    return ShrinkResult(small, whole, dense, report(space_for(small, input_size)), *lost)


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)


class _Paired:
    """Batches of images alone, as pairs with labels that nothing reads."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return ((images, torch.full((len(images),), -1)) for images in self.batches)


@torch.no_grad()
def _loss_of(
    dense: nn.Module, small: nn.Module, batches: Iterable[Any], loss: Loss
) -> tuple[tuple[float, float], None]:
    """The mean loss of both models, batch by batch."""
    values = [(float(loss(dense, batch)), float(loss(small, batch))) for batch in batches]
    before, after = zip(*values, strict=True)
    return (sum(before) / len(values), sum(after) / len(values)), None


@torch.no_grad()
def _lost(
    dense: nn.Module, small: nn.Module, batches: Iterable[Any], loss: Loss | None, features: bool
) -> tuple[tuple[float, float], float | None]:
    """The mean loss of both models over images, or their distance, and how often their first choices are the same."""
    before = after = same = 0.0
    images = 0
    device = next(dense.parameters()).device
    for batch in batches:
        count = len(batch[0])
        wanted, seen = (torch.stack(heads_of(m(batch[0].to(device)))).mean(0).float() for m in (dense, small))
        if loss is not None:
            before += count * float(loss(dense, batch))
            after += count * float(loss(small, batch))
        else:
            after += float(distances(seen, wanted, features=features).sum())
        if not features and wanted.ndim == 2:
            same += float((wanted.argmax(1) == seen.argmax(1)).sum())
        images += count
    return (before / images, after / images), None if features or wanted.ndim != 2 else same / images
