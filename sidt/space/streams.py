"""Widths that can be rotated: who writes a residual stream, and who reads it through which norm.

An orthogonal matrix between all that write a stream and all that read it changes nothing, if every reader stands behind
a norm that does not see the matrix, with linear layers alone after it. What the axis table cannot tell, namely which
layers read a norm, the file of the family says in its sections ``norms`` and ``scales``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sidt.space.axes import Axis, names
from sidt.space.families import Family, instances
from sidt.space.trace import Trace


@dataclass(frozen=True)
class Stream:
    """Where the units of a width that can be rotated live.

    Attributes:
        norms: for each norm on it, the weights that read what the norm gives.
        scales: for each scale on it, the weight that writes what is scaled.
        padded: the norms behind which zeros are put beside what they give, which a shift in their readers would move.
        places: all other tensors, each with the positions of its axes that have the units.
    """

    norms: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, str]
    padded: frozenset[str]
    places: Mapping[str, tuple[int, ...]]

    def input_of(self, reader: str) -> int:
        """The position of the axis of a weight that has what it reads: 1, or 0 of a transposed convolution."""
        return self.places[reader][-1]


def stream_of(
    width: str,
    tensors: Mapping[str, tuple[Axis, ...]],
    trace: Trace,
    family: Family,
    outside: tuple[str, ...] = (),
) -> Stream | str:
    """How a width can be rotated, or in a few words why it cannot.

    Args:
        width: the dimension.
        tensors: the axes of the model's tensors by name.
        trace: says which tensors are weights of linear layers or convolutions, and which are used before others.
        family: says which layers follow a norm or a scale.
        outside: weights that read what goes out of the backbone: of a norm that nothing in it reads.
    """
    layers = trace.positions
    own = {n: t for n, t in tensors.items() if any(width in names(axis) for axis in t)}
    norms: dict[str, tuple[str, ...]] = {}
    scales: dict[str, str] = {}
    for name in own:
        owner = name.rpartition(".")[0]
        if owner in norms:
            continue
        if (readers := instances(family.norms, owner)) is not None:
            inside = tuple(w for r in readers if (w := f"{r}.weight") in own)
            if not inside and (not outside or outside in norms.values()):
                return f"what {owner} gives goes out of the model"
            norms[owner] = inside or outside
        elif (writers := instances(family.scales, name)) is not None:
            scales[name] = f"{writers[0]}.weight"
    behind = {weight for readers in norms.values() for weight in readers}
    places: dict[str, tuple[int, ...]] = {}
    for name, axes in own.items():
        owner = name.rpartition(".")[0]
        if owner in norms or name in scales:
            continue
        at = tuple(d for d, axis in enumerate(axes) if width in names(axis))
        if any(len(axes[d]) != 1 for d in at):
            return f"{name} has it beside other units"
        if (1 in at or name in outside) and name in layers and name not in behind:
            return f"{name} reads it, but not through a norm that only linear layers read"
        is_bias = len(axes) == 1 and f"{owner}.weight" in own and f"{owner}.weight" in layers
        if not (name in layers or is_bias or len(axes) > 2):
            return f"{owner} changes the stream itself"
        places[name] = at
    if not norms:
        return "no norm stands before what reads it"
    last = [n for n, at in places.items() if 0 in at and n in layers and n not in behind]
    if (reason := _out_of_order(norms, last, trace)) is not None:
        return reason
    padded = frozenset(norm for norm in norms if instances(dict.fromkeys(family.padded, ()), norm) is not None)
    return Stream(norms, scales, padded, places)


def _out_of_order(norms: Mapping[str, tuple[str, ...]], writers: Iterable[str], trace: Trace) -> str | None:
    """Why a stream is not what its norms give to their readers: one stands behind them, or nothing is last."""
    first = {name: i for i, name in enumerate(trace.order)}
    at = {norm: first[f"{norm}.weight"] for norm in norms if f"{norm}.weight" in first}
    for norm in at:
        for reader in norms[norm]:
            if first.get(reader, at[norm]) < at[norm]:
                return f"{norm} stands behind {reader} and not before it"
    for writer in writers:
        if at and first.get(writer, 0) > max(at.values()):
            return f"what {writer} gives goes out of the model"
    return None
