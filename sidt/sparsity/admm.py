"""ADMM: training towards any structure, by targets that weights are pulled to.

``min loss(W)`` with W of a structure becomes, round after round (Boyd et al. 2011; for pruning Zhang et al. 2018)::

    W := train on loss + rho / 2 * |W - Z + U|^2
    Z := project(W + U)
    U := U + W - Z
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.files import replacing
from sidt.sparsity.holding import weights_of
from sidt.sparsity.structures import Structure
from sidt.sparsity.values import Floats

Train = Callable[[Callable[[], Tensor], int], None]  # trains the model on its loss plus a term, in a round


class Admm:
    """The targets Z and duals U of weights.

    Each pattern of a structure, and its values, has a pair of its own, as PatDNN has one for patterns and one for
    connectivity: what several constraints ask for is met by all pulls together, and by projection in the end.

    Attributes:
        model: the model that is trained.
        rho: the weight of the pulls.
    """

    def __init__(self, model: nn.Module, structures: Mapping[str, Structure], rho: float) -> None:
        """Start at ``Z = project(W)``, ``U = 0``.

        Raises:
            InputError: a weight is not there, or its structure is not for it.
        """
        self.model, self.rho = model, rho
        weights_of(model, structures)
        self._parts = {(name, i): part for name, s in structures.items() for i, part in enumerate(parts_of(s))}
        self._targets = {key: part.project(self._weight(key)) for key, part in self._parts.items()}
        self._duals = {key: torch.zeros_like(target) for key, target in self._targets.items()}

    def _weight(self, key: tuple[str, int]) -> Tensor:
        return self.model.get_parameter(key[0])

    def penalty(self) -> Tensor:
        """``rho / 2 * sum |W - Z + U|^2``, a scalar; what training adds to its loss."""
        device = self._weight(next(iter(self._parts))).device
        terms = [(self._weight(k) - (z - self._duals[k]).to(device)).square().sum() for k, z in self._targets.items()]
        return self.rho / 2 * torch.stack(terms).sum()

    @torch.no_grad()
    def update(self) -> None:
        """The other two steps of a round."""
        for key, part in self._parts.items():
            weight = self._weight(key).to(self._duals[key].device)
            self._targets[key] = part.project(weight + self._duals[key])
            self._duals[key] = self._duals[key] + weight - self._targets[key]

    def strengthen(self, growth: float) -> None:
        """Pull ``growth`` times as hard. U is the dual over rho, so that the dual itself stays."""
        self.rho *= growth
        self._duals = {key: dual / growth for key, dual in self._duals.items()}

    @torch.no_grad()
    def distance(self) -> float:
        """``|W - Z| / |W|`` over all weights: 0 once they are where they are pulled to."""
        apart = sum(float((self._weight(k).cpu() - z.cpu()).square().sum()) for k, z in self._targets.items())
        size = sum(float(self._weight(k).square().sum()) for k in self._targets)
        return (apart / size) ** 0.5 if size else 0.0

    def state(self) -> dict[str, Tensor]:
        """Targets and duals, by names that :meth:`load` knows."""
        pairs = {"target": self._targets, "dual": self._duals}
        return {f"{what}.{i}.{name}": t.cpu().clone() for what, pair in pairs.items() for (name, i), t in pair.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state.

        Raises:
            InputError: it is of other weights or structures.
        """
        mine = self.state()
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in state.items()}:
            raise InputError("the state of ADMM is of other weights or structures; start again in another folder")
        for what, pair in (("target", self._targets), ("dual", self._duals)):
            for key in pair:
                pair[key] = state[f"{what}.{key[1]}.{key[0]}"]


def parts_of(structure: Structure) -> list[Structure]:
    """The structures of one pattern each, and of values alone, that a structure is made of; without any: itself."""
    parts = [Structure((pattern,)) for pattern in structure.patterns]
    if not isinstance(structure.values, Floats):
        parts.append(Structure((), structure.values))
    return parts or [structure]


def train_by_admm(
    model: nn.Module,
    structures: Mapping[str, Structure],
    train: Train,
    *,
    rounds: int,
    rho: float,
    growth: float = 1.0,
    file: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Train a model towards structures, in place. It is not there in the end, but near: project it.

    Args:
        model: the model.
        structures: by the names of weights.
        train: trains the model on its loss plus the term it is given, in that round (from 0), on any loss and by any
            trainer.
        rounds: how many.
        rho: the weight of the pulls in the first round.
        growth: what rho is multiplied by after each.
        file: of the state after each round, safetensors; the same call goes on from there.
        say: told the distance after each round.

    Raises:
        InputError: the state in the file is damaged or of another model.
    """
    admm, done = Admm(model, structures, rho), 0
    if file is not None and file.is_file():
        done = _restore(admm, file)
        admm.rho = rho * growth**done
    for round_ in range(done, rounds):
        train(admm.penalty, round_)
        admm.update()
        if say is not None:
            say(f"round {round_ + 1} of {rounds}: rho {admm.rho:.1e}, {admm.distance():.1%} from the structure")
        admm.strengthen(growth)
        if file is not None:
            _keep(admm, file, round_ + 1)


def _keep(admm: Admm, file: Path, done: int) -> None:
    weights = {f"model.{name}": t.detach().cpu().clone() for name, t in admm.model.state_dict().items()}
    with replacing(file) as temporary:
        temporary.write_bytes(dump_tensors(weights | admm.state(), metadata={"rounds": str(done)}))


def _restore(admm: Admm, file: Path) -> int:
    try:
        with safe_open(file, framework="pt") as opened:
            done = int((opened.metadata() or {}).get("rounds", ""))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - the file is no mapping
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        admm.load({name: t for name, t in tensors.items() if not name.startswith("model.")})
        admm.model.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot go on from {file}: {' '.join(str(error).split())[:200]}; delete it") from None
    return done
