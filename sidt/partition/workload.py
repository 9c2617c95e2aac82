"""What of a model can be cut, and what the pieces cost: a grid of rows x units for each attention and each MLP.

A sublayer (an attention, an MLP) is a sum over its units: heads, hidden units. Each unit has rows of the first weights
and columns of the last one, and the sublayer's output is the sum of what its units give, and one bias. So a range of
units can stand on one device and the rest on others, as in tensor parallelism; the axes of the search space say which
entries are whose, and no class is named. Rows are what a sublayer treats each by itself:

- of an MLP without convolutions, tokens: every position of every image;
- of an MLP that convolves, images;
- of an attention, what attends to itself: windows, or images where there are none. A single image of a plain ViT is
  one row, so that its attentions are cut by heads alone.

What is left (embeddings, norms, residual sums, merging, the head) every device does for itself: in a transformer this
is little, and the stream between sublayers is then whole on every device. So are the parameters it needs.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sidt.cost.complexity import CostTerm, cost_terms
from sidt.errors import InputError
from sidt.space.axes import term_size
from sidt.space.space import DimensionSpace, owner_of
from sidt.space.trace import meta_copy

FLOAT = 4  # bytes of an entry


@dataclass(frozen=True)
class Sublayer:
    """One attention or MLP as a grid of rows x units.

    Attributes:
        dimension: whose units are cut: ``heads.3``, ``hidden.0.1``.
        owner: the module.
        kind: ``heads`` or ``mlp``.
        rows: what it treats each by itself, in all images.
        tokens: tokens in a row.
        units: how many there are; 1 where the dimension must stay whole, which is then one piece.
        unit_macs: multiply-adds of one unit for one row.
        shared_macs: multiply-adds for one row that every device with units of it does.
        unit_bytes: bytes of the parameters of one unit.
        shared_bytes: bytes of the parameters that every device with units of it holds.
        row_bytes: bytes of what it gives for one row.
    """

    dimension: str
    owner: str
    kind: str
    rows: int
    tokens: int
    units: int
    unit_macs: float
    shared_macs: float
    unit_bytes: int
    shared_bytes: int
    row_bytes: int

    @property
    def macs(self) -> float:
        """Multiply-adds of all of it on one device."""
        return self.rows * (self.units * self.unit_macs + self.shared_macs)

    def bytes_of(self, units: int) -> int:
        """Bytes of the parameters on a device with so many of the units."""
        return units * self.unit_bytes + (self.shared_bytes if units else 0)


@dataclass(frozen=True)
class Workload:
    """What one forward of a batch is made of.

    Attributes:
        images: in the batch.
        sublayers: in the model's order; those without units are part of the rest.
        rest_macs: multiply-adds that every device does for itself.
        rest_bytes: bytes of the parameters that every device holds.
        image_bytes: bytes of the batch, which the first device sends to the others.
    """

    images: int
    sublayers: tuple[Sublayer, ...]
    rest_macs: float
    rest_bytes: int
    image_bytes: int

    @property
    def macs(self) -> float:
        """Multiply-adds of the whole on one device."""
        return self.rest_macs + sum(s.macs for s in self.sublayers)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return self.rest_bytes + sum(s.bytes_of(s.units) for s in self.sublayers)

    def timed(self, total: float, seconds: Mapping[str, float]) -> "Workload":
        """The same with what a machine needs in place of what is counted: norms, softmax and copies take time too.

        Args:
            total: seconds of a forward.
            seconds: of them, those in each sublayer, by owner.

        Returns:
            Loads in multiply-adds that the machine does in that time at its mean speed: as many in all as before.
        """
        speed = self.macs / total
        found = []
        for sublayer in self.sublayers:
            factor = seconds[sublayer.owner] * speed / sublayer.macs
            found.append(
                replace(sublayer, unit_macs=sublayer.unit_macs * factor, shared_macs=sublayer.shared_macs * factor)
            )
        rest = max(total - sum(seconds[s.owner] for s in self.sublayers), 0.0)
        return replace(self, sublayers=tuple(found), rest_macs=rest * speed)


def workload_of(model: nn.Module, space: DimensionSpace, images: int = 1) -> Workload:
    """The sublayers of a dense or sliced model, and what their rows and units cost.

    Args:
        model: any model of a search space; nothing is computed.
        space: its own space (of a sliced model :func:`sidt.space_for` of it), with the images' size.
        images: in a batch.

    Raises:
        InputError: there is no sublayer with units.
    """
    owners = {
        d.name: space.attention.get(d.name) or owner_of(d.name, space.places)
        for d in space.dimensions.values()
        if d.kind in ("heads", "mlp") and d.size
    }
    # What has another sublayer inside, as a pooling with an MLP, is no sum over its units, and stays in one piece. So
    # do heads that are mixed (talking heads), and what gives other tokens than it is given (class attention), or
    # another width, or more than tokens (MViTv2's give the map's size).
    owners = {n: o for n, o in owners.items() if not any(inner.startswith(f"{o}.") for inner in owners.values())}
    owners = {n: o for n, o in owners.items() if not space.mixing(n)}
    count = Counter(owners.values())  # attention and MLP side by side, in one module
    owners = {n: o for n, o in owners.items() if count[o] == 1}
    streams = _streams(model, list(owners.values()), (images, *space.trace.input_size))
    owners = {n: o for n, o in owners.items() if o in streams}
    terms = cost_terms(space)
    order = {name: place for place, name in enumerate(dict(model.named_modules()))}
    sublayers = []
    for name, owner in sorted(owners.items(), key=lambda item: order[item[1]]):
        own = [t for t in terms if t.module == owner or t.module.startswith(f"{owner}.")]
        shape = streams[owner]
        rows = shape[:-1].numel() if tokenwise(space, owner) else shape[0]
        whole = space.dimensions[name].fixed or space.dimensions[name].normed  # a norm sees all units
        units = 1 if whole else space.sizes[name]
        bound = own if whole else [t for t in own if name in t.dimensions]
        shared = [t for t in own if t not in bound]
        macs, entries = _summed(bound, space.sizes)
        shared_macs, shared_entries = _summed(shared, space.sizes)
        sublayers.append(
            Sublayer(
                dimension=name,
                owner=owner,
                kind=space.dimensions[name].kind,
                rows=rows,
                tokens=shape[:-1].numel() // rows,
                units=units,
                unit_macs=macs * images / rows / units,
                shared_macs=shared_macs * images / rows,
                unit_bytes=entries // units * FLOAT,
                shared_bytes=shared_entries * FLOAT,
                row_bytes=shape.numel() // rows * FLOAT,
            )
        )
    if not sublayers:
        raise InputError(f"this {space.model} has no heads and no hidden units left to cut; it is one piece")
    macs, entries = _summed(terms, space.sizes)
    channels, height, width = space.trace.input_size
    return Workload(
        images,
        tuple(sublayers),
        macs * images - sum(s.macs for s in sublayers),
        entries * FLOAT - sum(s.bytes_of(s.units) for s in sublayers),
        images * channels * height * width * FLOAT,
    )


def tokenwise(space: DimensionSpace, owner: str) -> bool:
    """Whether a module treats each token by itself: it is no attention, and none of its weights is a kernel."""
    kernels = any(len(p.axes) > 2 for name, p in space.places.items() if name.startswith(f"{owner}."))
    return owner not in space.attention.values() and not kernels


def _summed(terms: list[CostTerm], sizes: Mapping[str, int]) -> tuple[int, int]:
    """Multiply-adds and parameters of some terms."""
    counts = [term_size(t.dimensions, sizes) * all(sizes[n] for n in t.present) for t in terms]
    macs = sum(n * t.macs for n, t in zip(counts, terms, strict=True))
    return macs, sum(n * t.params for n, t in zip(counts, terms, strict=True))


def _streams(model: nn.Module, owners: list[str], shape: tuple[int, ...]) -> dict[str, torch.Size]:
    """The shape of what each of some modules is given and gives in a forward; none if it is not one tensor."""
    twin, seen = meta_copy(model), dict[str, torch.Size]()

    def note(owner: str, given: Tensor, out: object) -> None:
        if isinstance(out, Tensor) and given.shape == out.shape:
            seen[owner] = given.shape

    for owner in owners:
        module = twin.get_submodule(owner)
        module.register_forward_hook(lambda _, given, out, owner=owner: note(owner, given[0], out))
    with torch.no_grad():
        twin(torch.empty(shape, device="meta", dtype=next(twin.parameters()).dtype))
    return seen
