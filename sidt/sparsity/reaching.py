"""The penalty of a compression's config: what training adds to its loss so that groups of weights become zero."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from sidt.errors import InputError
from sidt.space.space import DimensionSpace
from sidt.sparsity.config import ReachConfig
from sidt.sparsity.patterns import Largest
from sidt.sparsity.penalties import clipped, group_lasso, hoyer_square
from sidt.sparsity.structures import Structure
from sidt.sparsity.units import unit_norms


def penalty_of(
    model: nn.Module, config: ReachConfig, structures: Mapping[str, Structure], space: DimensionSpace | None
) -> Callable[[], Tensor]:
    """The penalty that a config asks for, as a function that gives a scalar.

    Args:
        model: whose weights.
        config: by a penalty: lasso, hoyer or clipped.
        structures: by the names of weights.
        space: the model's, whose units may be what the penalty is on.

    Raises:
        InputError: it is to be on the groups of structures, and none has tiles as its first pattern.
    """
    tiles = {n: p.tiles for n, s in structures.items() for p in s.patterns[:1] if isinstance(p, Largest)}
    if config.groups == "structures" and not tiles:
        raise InputError(f"reach.by is {config.by!r}, and no structure has tiles as its first pattern; use by: admm")

    def penalty() -> Tensor:
        if config.groups == "units":
            assert space is not None
            norms = list(unit_norms(model, space).values())
        else:
            norms = [t.norms(model.get_parameter(n)) for n, t in tiles.items()]
        if config.by == "clipped":
            return config.strength * clipped(norms, config.eta)
        return config.strength * (group_lasso if config.by == "lasso" else hoyer_square)(norms)

    return penalty
