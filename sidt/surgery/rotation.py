"""Rotation of the residual stream: a basis in which the first units of a width carry nearly everything.

A LayerNorm commutes with every orthogonal matrix that leaves the vector of ones where it is, and an RMSNorm with every
one (SliceGPT's identity). So once the norms' scales and shifts are folded into the layers that read them, all that
write a stream may be multiplied by such a matrix, and all that read it by its transpose: the model computes the same,
in the same modules.

The directions, most important first, are eigenvectors of the mean, over the norms that read the stream, of the second
moments of what they give without scale and shift: every token counts alike. Behind an RMSNorm the units are these
directions. Behind a LayerNorm they are the rows of Helmert's matrix: of the first k units, whatever the directions
from the k-th on add is the same in all, which the norm of the sliced model takes away. So **the first k units are
exactly the first k - 1 directions**, cut by an index like any other unit, and one unit is the price of the mean.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sidt.space.axes import Axis, axis_size, term_size
from sidt.space.space import DimensionSpace
from sidt.space.streams import Stream


def rotatable(space: DimensionSpace) -> dict[str, Stream]:
    """The widths of a space that can be rotated."""
    return {name: stream for name, stream in space.streams.items() if isinstance(stream, Stream)}


def takes_mean(norm: nn.Module, size: int) -> bool:
    """Whether a norm over ``size`` units takes their mean away, as a LayerNorm does and an RMSNorm does not.

    It is asked rather than told by its class: libraries have several of each.
    """
    reference = next(norm.parameters(), torch.ones(()))
    scale, shift = _affine(norm)
    ones = reference.new_ones(1, size)
    try:
        out = norm(ones)
    except RuntimeError:  # one of maps, [B, C, H, W]
        out = norm(ones[..., None, None])
    given = out.flatten() - (0 if shift is None else shift)
    return bool((given - (0 if scale is None else scale)).abs().max() > given.abs().max())


def fold_norms(model: nn.Module, space: DimensionSpace) -> None:
    """Move scales and shifts of the norms on rotatable widths into the layers that read them, in place.

    A shift that a layer without bias reads stays in the norm, divided by the scale; as does one that no bias can stand
    for: it is not in the zeros that a map or a convolution is padded with, and a transposed convolution has another sum
    of it at every entry of its kernel. What a LayerScale does moves into the layer before it.
    """
    with torch.no_grad():
        for stream in rotatable(space).values():
            for scale, writer in stream.scales.items():
                gamma = model.get_parameter(scale)
                weight, bias = model.get_parameter(writer), _bias(model, writer)
                weight.mul_(gamma.view(-1, *[1] * (weight.ndim - 1)))
                if bias is not None:
                    bias.mul_(gamma)
                gamma.fill_(1)
            for norm, readers in stream.norms.items():
                fold_shift = norm not in stream.padded and all(_takes_shift(model, reader) for reader in readers)
                _fold(model, norm, {reader: stream.input_of(reader) for reader in readers}, fold_shift)


def _fold(model: nn.Module, name: str, readers: Mapping[str, int], fold_shift: bool) -> None:
    """Fold one norm into the weights that read it, each along the axis of its inputs."""
    scale, shift = _affine(model.get_submodule(name))
    if scale is None:
        return
    for reader, dim in readers.items():
        weight = model.get_parameter(reader)
        if shift is not None and fold_shift:
            bias = _bias(model, reader)
            assert bias is not None
            whole = weight.double().movedim(dim, -1).flatten(1, -2) if weight.ndim > 2 else weight.double()[:, None]
            bias += (whole.sum(1) @ shift.double()).to(bias)
        weight.mul_(scale.view([-1 if d == dim else 1 for d in range(weight.ndim)]))
    if shift is not None:
        # A unit that the norm scales to nothing is shifted for no reader: its column is zero by now.
        small = scale.abs() <= torch.finfo(scale.dtype).eps * scale.abs().max()
        shift.copy_(torch.zeros_like(shift) if fold_shift else torch.where(small, 0.0, shift / scale))
    scale.fill_(1)


def basis(model: nn.Module, space: DimensionSpace, width: str, inputs: Iterable[tuple[str, Tensor]]) -> Tensor:
    """The orthogonal matrix [C, C] whose rows are the new units of a width.

    Args:
        model: with its norms folded.
        space: its space.
        width: one that can be rotated.
        inputs: for each norm on it, the second moments [units, units] of what it gives.
    """
    stream, size = rotatable(space)[width], space.sizes[width]
    mean = torch.zeros(size, size, dtype=torch.float64)
    for norm, moment in inputs:
        mean += _blocks(moment, units_of(space, stream, norm), width, space.sizes) / len(stream.norms)
    centred = any(takes_mean(model.get_submodule(norm), norm_size(space, stream, norm)) for norm in stream.norms)
    if not centred:
        return _sorted(mean).T.contiguous()
    helmert, ones = helmert_rows(size), torch.full((size,), size**-0.5, dtype=torch.float64)
    directions = helmert @ _sorted(helmert.T @ mean @ helmert)  # orthogonal to the ones
    return helmert @ directions.T + torch.outer(ones, ones)


def helmert_rows(size: int) -> Tensor:
    """Helmert's orthonormal basis of the vectors without a mean, [size, size - 1]: column j has j + 2 entries."""
    below = torch.arange(1, size, dtype=torch.float64)
    whole = torch.ones(size, size - 1, dtype=torch.float64).triu()
    whole[torch.arange(1, size), torch.arange(size - 1)] = -below
    return whole / (below * (below + 1)).sqrt()


def rotate(model: nn.Module, space: DimensionSpace, width: str, matrix: Tensor) -> None:
    """Multiply everything that writes or reads a width by an orthogonal matrix [C, C], in place; norms are folded."""
    stream = rotatable(space)[width]
    with torch.no_grad():
        for name, at in stream.places.items():
            tensor = model.get_parameter(name)
            for dim in at:
                tensor.copy_(turned(tensor, dim, space.places[name].axes[dim], width, space.sizes, matrix))
        for norm in stream.norms:
            shift = _affine(model.get_submodule(norm))[1]
            if shift is not None:
                axis = space.places[f"{norm}.bias"].axes[0]
                shift.copy_(turned(shift, 0, axis, width, space.sizes, matrix))


def turned(tensor: Tensor, dim: int, axis: Axis, width: str, sizes: Mapping[str, int], matrix: Tensor) -> Tensor:
    """A tensor in float64 whose units of a width along one of its axes are multiplied by a matrix [new, C]."""
    matrix = matrix.to(tensor.device)
    return changed(
        tensor.double(), dim, axis, width, sizes, lambda units: torch.einsum("kc,...aci->...aki", matrix, units)
    )


def changed(
    tensor: Tensor, dim: int, axis: Axis, width: str, sizes: Mapping[str, int], change: Callable[[Tensor], Tensor]
) -> Tensor:
    """A tensor whose units of a width along one of its axes are changed.

    Args:
        tensor: any.
        dim: the axis.
        axis: what it is made of.
        width: one of its dimensions.
        sizes: of all dimensions.
        change: is given the units as the last axis but one, [..., C, what repeats within a unit], and keeps the others.
    """
    (term,) = axis
    position = term.index(width)
    inner = term_size(term[position + 1 :], sizes)
    split = tensor.movedim(dim, -1)
    before, shape = split.shape[:-1], (-1, sizes[width], inner)
    moved: Tensor = change(split.reshape(*before, *shape)).reshape(*before, -1).movedim(-1, dim)
    return moved


def _blocks(moment: Tensor, axis: Axis, width: str, sizes: Mapping[str, int]) -> Tensor:
    """The sum of the blocks of a width on the diagonal of second moments, as of ``4 embed``: [C, C]."""
    (term,) = axis
    position = term.index(width)
    outer, inner = (term_size(part, sizes) for part in (term[:position], term[position + 1 :]))
    split = moment.reshape(outer, sizes[width], inner, outer, sizes[width], inner)
    return torch.einsum("acibdj,ab,ij->cd", split, *(torch.eye(n, dtype=moment.dtype) for n in (outer, inner)))


def units_of(space: DimensionSpace, stream: Stream, norm: str) -> Axis:
    """The axis of what a norm gives."""
    reader = stream.norms[norm][0]
    return space.places[reader].axes[stream.input_of(reader)]


def norm_size(space: DimensionSpace, stream: Stream, norm: str) -> int:
    """How many units a norm is over."""
    return axis_size(units_of(space, stream, norm), space.sizes)


def taps_of(space: DimensionSpace, stream: Stream, reader: str) -> int:
    """How many positions of the map an output of a reader is made of: the entries of a convolution's kernel."""
    axes, size = space.places[reader].axes, 1
    for axis in axes[2:] if stream.input_of(reader) == 1 else ():
        size *= axis_size(axis, space.sizes)
    return size


def columns_of(space: DimensionSpace, stream: Stream, reader: str) -> Axis:
    """The axis of all that an output of a reader is made of: the units, each at every entry of the kernel."""
    (term,) = space.places[reader].axes[stream.input_of(reader)]
    return ((*term, taps_of(space, stream, reader)),)


def _sorted(moment: Tensor) -> Tensor:
    """Eigenvectors as columns, that of the largest value first."""
    vectors: Tensor = torch.linalg.eigh(moment)[1]
    return vectors.flip(1)


def _affine(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _takes_shift(model: nn.Module, weight: str) -> bool:
    """Whether the bias of a layer can take what it reads of a shift."""
    layer = model.get_submodule(weight.rpartition(".")[0])
    padding = getattr(layer, "padding", "valid")
    padded = padding != "valid" if isinstance(padding, str) else any(padding)
    return _bias(model, weight) is not None and not padded and not getattr(layer, "transposed", False)


def _bias(model: nn.Module, weight: str) -> Tensor | None:
    owner, _, _ = weight.rpartition(".")
    return getattr(model.get_submodule(owner), "bias", None)
