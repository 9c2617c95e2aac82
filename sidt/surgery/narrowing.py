"""Layers behind the norms of a rotated width that lost units, refitted in closed form.

Of what a norm gives, x without scale and shift, the sliced norm gives ``c T x``: the first units (behind a LayerNorm
without their mean), larger, since a norm makes its output as long as it has units. With one factor c for all tokens
this is linear in x, so the least-squares weights follow from the dense model's moments alone. A convolution reads it
of every position under its kernel, and of the shift nothing where it pads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.space.axes import kept_indices
from sidt.space.plan import DimensionPlan
from sidt.space.streams import Stream
from sidt.surgery.moments import Moments
from sidt.surgery.rotation import columns_of, norm_size, rotatable, takes_mean, taps_of, units_of


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What a layer behind a norm that lost units reads in the sliced model, made of what it reads in the dense one.

    Attributes:
        columns: those that are kept, of all taps.
        factor: how much longer the norm makes its units, c.
        take: the kept units made of all units, [kept, units].
        shift: what is added to them, [kept].
        taps: how many positions an output is made of; a column is a unit at one of them. Of several, the moments say
            too which are inside the map.
    """

    columns: Tensor
    factor: Tensor
    take: Tensor
    shift: Tensor
    taps: int

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows as those of the moments -> [kept + 1, n], the constant 1 last."""
        inputs, inside = self.take.shape[1] * self.taps, rows[-1 - self.taps : -1] if self.taps > 1 else rows[-1:]
        kept = self.take @ rows[:inputs].reshape(self.take.shape[1], -1)
        shifted = kept.view(-1, self.taps, rows.shape[1]) + self.shift[:, None, None] * inside
        return torch.cat([shifted.flatten(0, 1), rows[-1:]])

    def widened(self, weight: Tensor) -> Tensor:
        """A weight [out, inputs + 1] with the columns of the moments: it reads nothing of what is inside the map."""
        inside = weight.new_zeros(len(weight), self.taps if self.taps > 1 else 0)
        return torch.cat([weight[:, :-1], inside, weight[:, -1:]], 1)


def narrowed(model: nn.Module, plan: DimensionPlan, moments: Moments) -> dict[str, Narrowed]:
    """For each weight that reads a rotated width that lost units, what it reads in the sliced model.

    Args:
        model: the aligned model.
        plan: what is kept of it.
        moments: of its layers' inputs.

    Raises:
        InputError: a norm scales its units: the model is not, or no longer, aligned.
    """
    space, sizes = plan.space, plan.sizes
    found: dict[str, Narrowed] = {}
    for width, stream in rotatable(space).items():
        if not space.dimensions[width].ordered or sizes[width] == space.sizes[width]:
            continue
        for norm, readers in stream.norms.items():
            scale = getattr(model.get_submodule(norm), "weight", None)
            if scale is not None and not (scale == 1).all():
                raise InputError(f"{norm} scales its units; align the model again after it was trained")
            units = torch.from_numpy(kept_indices(units_of(space, stream, norm), space.sizes, plan.keep, space.per))
            count, size = len(units), norm_size(space, stream, norm)
            take = torch.zeros(count, size, dtype=torch.float64)
            take[torch.arange(count), units] = 1
            if takes_mean(model.get_submodule(norm), size):
                take -= take.mean(0)
            shift = _shift(model, norm, size)
            for reader in readers:  # they may read other tokens, as the two heads of a distilled model
                given = given_to(model, moments, stream, norm, reader)
                left = (take @ given @ take.T).trace().clamp(min=torch.finfo(torch.float64).tiny)
                # A norm makes a token as long as it has units; a reader may see a mean of tokens, which is shorter.
                factor = (count / size * given.trace() / left).sqrt()
                axis = columns_of(space, stream, reader)
                columns = torch.from_numpy(kept_indices(axis, space.sizes, plan.keep, space.per))
                added = shift[units] - factor * take @ shift
                found[reader] = Narrowed(columns, factor, factor * take, added, taps_of(space, stream, reader))
    return found


def given_to(model: nn.Module, moments: Moments, stream: Stream, norm: str, reader: str) -> Tensor:
    """Second moments [units, units] of what a norm without a scale gives one of its readers, its shift left out.

    Of a convolution, those at the tap that is most often inside the map.
    """
    moment, taps = moments.read_by(reader), taps_of(moments.space, stream, reader)
    if taps > 1:
        tap = moment.diagonal()[-1 - taps : -1].argmax()
        moment = moment[tap:-1:taps, tap:-1:taps] / moment[tap - 1 - taps, tap - 1 - taps]
    shift = _shift(model, norm, len(moment) - 1)
    mean = torch.outer(moment[:-1, -1], shift)
    return moment[:-1, :-1] - mean - mean.T + torch.outer(shift, shift)


def _shift(model: nn.Module, norm: str, size: int) -> Tensor:
    shift = getattr(model.get_submodule(norm), "bias", None)
    return torch.zeros(size, dtype=torch.float64) if shift is None else shift.detach().double().cpu()
