"""Second moments of what layers read, over calibration images: what alignment and repair stand on.

A convolution is a linear layer on its unfolded patches. Nothing is kept of the images but one square matrix a layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sidt.errors import InputError
from sidt.files import replacing
from sidt.space.axes import names
from sidt.space.space import DimensionSpace, space_for
from sidt.surgery.heads import with_head
from sidt.surgery.rotation import fold_norms, rotatable, taps_of
from sidt.surgery.slicing import explicit
from sidt.surgery.symmetric import Strips, gram, mirrored, strips_of, upper, whole

Forward = Callable[[nn.Module, Any], object]  # runs a model on a batch
Rows = tuple[str, int]  # a weight, and the first of its rows that read one input


def run_images(model: nn.Module, batch: Any) -> object:
    """Run a model on the images of a batch (images, targets)."""
    return model(batch[0].to(next(model.parameters()).device))


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean second moments of the inputs of a model's layers.

    Attributes:
        space: the model's space.
        inputs: for each weight and the first row that reads it, in strips: float64 [in + 1, in + 1] on the CPU, the
            mean of ``x x^T`` over all positions of all images, where x ends with the constant 1. For a convolution
            behind a norm on a width that can be rotated, x has one unit more: 1 inside the map, 0 where it is padded.
    """

    space: DimensionSpace
    inputs: Mapping[Rows, Strips]

    def read_by(self, weight: str, row: int = 0) -> Tensor:
        """The moments of what a row of a weight reads; they are not to be changed.

        Raises:
            InputError: the layer was not run by the forward that the moments were measured with.
        """
        first = max((start for name, start in self.inputs if name == weight and start <= row), default=None)
        if first is None:
            raise InputError(f"no calibration image went through {weight}; measure the moments with another forward")
        return whole(self.inputs[weight, first])

    def replaced(self, inputs: Iterable[tuple[Rows, Tensor]]) -> "Moments":
        """The same with some of the inputs replaced."""
        return replace(self, inputs={**self.inputs, **{rows: strips_of(moment) for rows, moment in inputs}})

    def save(self, path: str | Path, made_of: Any) -> None:
        """Write the moments as safetensors, in one step: of each matrix, which is symmetric, the upper triangle.

        Args:
            path: the file.
            made_of: JSON values that say what they were measured on; see :func:`load_moments`.
        """
        triangles = {f"{name} {row}": upper(whole(strips)) for (name, row), strips in self.inputs.items()}
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(dump_tensors(triangles, metadata={_MADE_OF: dumps(made_of)}))


_MADE_OF = "made_of"


def load_moments(path: str | Path, space: DimensionSpace, made_of: Any) -> Moments | None:
    """Read moments that were saved; ``None`` if there are none, or none that were ``made_of`` the same.

    Raises:
        InputError: the file is damaged.
    """
    if not Path(path).is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_MADE_OF) != dumps(made_of):
                return None
            keys = [key.rpartition(" ") for key in file.keys()]  # noqa: SIM118 - the file is no mapping
            read = {(n, int(row)): strips_of(mirrored(file.get_tensor(f"{n} {row}"))) for n, _, row in keys}
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read the moments {path}: {reason}; delete it to measure them again") from None
    return Moments(space, read)


def measure_moments(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = run_images,
    space: DimensionSpace | None = None,
) -> Moments:
    """Second moments for :func:`sidt.align` and :func:`sidt.compensate`: the inputs of the layers that read heads, v
    or mlp, of those that write q and k, and of those that read a width that can be rotated.

    Of what a norm on such a width gives, scale and shift are left out: :func:`sidt.align` folds them into its readers.
    A timm model whose features go out is given a head first, as :func:`sidt.align` does.

    Memory is half to all of one float64 matrix of (inputs + 1)^2 for each of these layers, however many images there
    are.

    Args:
        model: the dense model; it is run in eval mode and not changed.
        batches: (images, targets), or what ``forward`` takes.
        forward: runs a model on a batch.
        space: the model's space, if it is at hand.

    Raises:
        InputError: there is no batch, or what a layer reads is not finite.
    """
    model, space = with_head(model, space or space_for(model))
    wanted = {name for name, place in space.places.items() if not place.is_buffer and _is_wanted(space, place.axes)}
    padded = {r for stream in rotatable(space).values() for norm in stream.padded for r in stream.norms[norm]}
    taps: dict[str, int] = {}
    for stream in rotatable(space).values():
        taps |= {r: taps_of(space, stream, r) for readers in stream.norms.values() for r in readers}
    wanted |= set(taps)
    totals: dict[Rows, Strips] = {}
    counts: dict[Rows, int] = {}
    twin, seen = explicit(model, space), 0
    fold_norms(twin, space)

    def add(rows: Rows, x: Tensor, weight: Tensor) -> None:
        if rows[0] in padded:
            x = x[x.any(1)]  # zeros beside the tokens are no tokens
        if (count := taps.get(rows[0], 1)) > 1:
            units = x.unflatten(1, (-1, count))
            x = torch.cat([units, units.any(1, keepdim=True)], 1).flatten(1)
        x = _with_one(x)
        strips = tuple(strip.double().cpu() for strip in gram(x))
        totals[rows] = tuple(map(Tensor.add_, totals[rows], strips)) if rows in totals else strips
        counts[rows] = counts.get(rows, 0) + len(x)

    with torch.no_grad(), watching(twin, wanted, add):
        for batch in batches:
            forward(twin, batch)
            seen += 1
    if not seen:
        raise InputError("the moments got no batch; give at least one image")
    finite = ((name, strip.diagonal().isfinite().all()) for (name, _), total in totals.items() for strip in total)
    if bad := next((name for name, is_finite in finite if not is_finite), None):
        raise InputError(f"what {bad} reads is not finite; check the model's weights and the images")
    return Moments(space, {rows: tuple(strip.div_(counts[rows]) for strip in t) for rows, t in totals.items()})


def _is_wanted(space: DimensionSpace, axes: Any) -> bool:
    if len(axes) < 2:
        return False
    kinds = [{space.dimensions[n].kind for n in names(axis)} for axis in axes[:2]]
    return "qk" in kinds[0] or bool(kinds[1] & {"heads", "v", "mlp", "channels"})


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


@contextmanager
def watching(model: nn.Module, wanted: Iterable[str], see: Callable[[Rows, Tensor, Tensor], None]) -> Iterator[None]:
    """For a block, show what some weights of a model read, positions x columns, in the order of execution."""
    own = dict(model.named_parameters())
    with _Watch({name: own[name] for name in wanted}, see):
        yield


class _Watch(TorchFunctionMode):
    """Sees the inputs of linear layers and of convolutions in one group, transposed ones too."""

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[Rows, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.names, self.see = {id(weight): name for name, weight in weights.items()}, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LAYERS:
            x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
            rows = rows_of(weight, self.names)
            if rows is not None and weight.numel() and in_one_group(func, args, kwargs):
                columns = x
                if func is F.conv2d:
                    columns = _patches(x, weight, args, kwargs)
                elif func is F.conv_transpose2d:  # every position by itself
                    columns = x.movedim(1, -1)
                self.see(rows, columns.detach().flatten(0, -2), weight)
        return func(*args, **kwargs)


def rows_of(weight: Tensor, names: Mapping[int, str]) -> Rows | None:
    """Which of the named weights (by ``id``) this one is, or is rows of, and its first row there."""
    whole = weight if id(weight) in names or weight._base is None else weight._base
    name = names.get(id(whole))
    return None if name is None else (name, int(weight.storage_offset()) // max(int(whole.stride(0)), 1))


LAYERS = (F.linear, F.conv2d, F.conv_transpose2d)  # what is linear in what it reads


def in_one_group(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of one of ``LAYERS`` makes every output of all inputs."""
    return func is F.linear or argument(args, kwargs, 6, "groups", 1) == 1


_MISSING = object()


def argument(args: Any, kwargs: Any, position: int, name: str, default: Any = _MISSING) -> Any:
    """An argument of a call, given by position or by name."""
    if name in kwargs:
        return kwargs[name]
    return args[position] if position < len(args) or default is _MISSING else default


def _patches(x: Tensor, weight: Tensor, args: Any, kwargs: Any) -> Tensor:
    """What a convolution multiplies its flattened kernels with: [B, positions, columns]."""
    stride, padding, dilation = (
        argument(args, kwargs, position, name, default)
        for position, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    unfolded = F.unfold(x, weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
    return unfolded.transpose(1, 2)
