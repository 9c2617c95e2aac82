"""Surgery: a plan applied to a model, as a smaller dense model or as a mask."""

import copy
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.space.axes import Axis, axis_size, kept_indices, names
from sidt.space.binding import get_attribute
from sidt.space.plan import DimensionPlan
from sidt.space.space import VANISHING, Dimension, DimensionSpace, owner_of
from sidt.surgery.norms import count_what_is_gone
from sidt.surgery.positions import remember, rows_of

Model = TypeVar("Model", bound=nn.Module)


def slice_model(model: Model, plan: DimensionPlan) -> Model:
    """A smaller dense model that has only the units of the plan. The given model is not changed.

    Layers stay timm's and torch's own; only an attention whose forward cannot take the sizes gets another, and a norm
    inside a sublayer one that counts what is gone (:mod:`sidt.surgery.norms`). The attention scale stays that of the
    dense model. The plan is kept as ``sidt_plan`` for :func:`sidt.save`; slicing a sliced model composes the plans.

    A sublayer without heads or hidden units adds its output bias. Its other parameters stay in place without
    entries (so they ask for no gradient).

    Raises:
        InputError: the plan was made for a model of other tensors, or an attention or MLP cannot take its sizes.
    """
    space = plan.space
    _check_fits(model, space)
    library = _library(space.forwards, space)
    sliced = copy.deepcopy(model)
    for name, place in space.places.items():
        owner, _, leaf = name.rpartition(".")
        module = sliced.get_submodule(owner)
        tensor = getattr(module, leaf).detach()
        for dim, axis in enumerate(place.axes):
            kept = torch.from_numpy(kept_indices(axis, space.sizes, plan.keep, space.per))
            if len(kept) < tensor.shape[dim]:
                tensor = tensor.index_select(dim, kept.to(tensor.device))
        if tensor.shape == getattr(module, leaf).shape:
            continue
        if place.is_buffer:
            setattr(module, leaf, tensor)
        else:
            trains = getattr(module, leaf).requires_grad and tensor.numel() > 0
            setattr(module, leaf, nn.Parameter(tensor.clone(), requires_grad=trains))
        follow(module)
        if hasattr(module, "normalized_shape") and any(space.dimensions[n].normed for n in names(place.axes[0])):
            count_what_is_gone(module, axis_size(place.axes[0], space.sizes), name)
    sizes = plan.sizes
    for heads, owner in space.attention.items():
        own = (heads, _child(space, heads, "qk"), _child(space, heads, "v"))
        pruned = any(sizes[n] < space.sizes[n] for n in own)
        rows = math.prod(s for s in rows_of(plan, *own[:2]) if isinstance(s, int)) * sizes[own[1]]
        attention = sliced.get_submodule(owner)
        _take_sizes(attention, sizes[heads], rows, sizes[own[2]], pruned=pruned, library=library)
        buffers = {forward.sliced: forward.buffers for forward in library.FORWARDS.values()}
        remember(attention, buffers.get(type(attention), ()), plan, *own[:2])
    for name, dimension in space.dimensions.items():
        if dimension.kind in VANISHING and dimension.size and not sizes[name]:
            _empty(list(_around(sliced, owner_of(name, space.places))), dimension, library)
    for path, axis in space.attributes.items():
        set_attribute(sliced, path, axis_size(axis, sizes))
    if space.own is not None:
        sliced.sidt_family = space.own  # type: ignore[assignment]
    earlier = getattr(model, "sidt_plan", None)
    sliced.sidt_plan = plan if earlier is None else earlier.then(plan)  # type: ignore[assignment]
    return sliced


def mask_model(model: Model, plan: DimensionPlan) -> Model:
    """A copy of the model in which every unit that the plan drops is zero in every place.

    For heads, qk, v and mlp its output is that of the sliced model. For width it is not: the statistics of a
    LayerNorm count the zeros.
    """
    _check_fits(model, plan.space)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, place in plan.space.places.items():
            tensor = masked.get_parameter(name) if not place.is_buffer else masked.get_buffer(name)
            for dim, mask in enumerate(_masks(place.axes, plan)):
                tensor.mul_(mask.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.ndim)]))
    return masked


def explicit(model: Model, space: DimensionSpace) -> Model:
    """A copy in eval mode that computes the same, whose attentions apply every weight by a call of its own.

    Torch's MultiheadAttention hides its layers; the forwards for sliced sizes do not.
    """
    library, twin = _library(space.forwards, space), copy.deepcopy(model)
    twin.eval()
    for owner in space.attention.values():
        module = twin.get_submodule(owner)
        if (forward := library.FORWARDS.get(type(module))) is not None:
            _change_forward(module, forward)
    return twin


def _masks(tensor_axes: tuple[Axis, ...], plan: DimensionPlan) -> list[Tensor]:
    space, masks = plan.space, []
    for axis in tensor_axes:
        mask = torch.zeros(axis_size(axis, space.sizes))
        mask[torch.from_numpy(kept_indices(axis, space.sizes, plan.keep, space.per))] = 1
        masks.append(mask)
    return masks


def _check_fits(model: nn.Module, space: DimensionSpace) -> None:
    tensors: Mapping[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, place in space.places.items():
        expected = [axis_size(axis, space.sizes) for axis in place.axes]
        seen = list(tensors[name].shape) if name in tensors else None
        if seen != expected:
            found = "is not in the model" if seen is None else f"has shape {seen} in the model"
            raise InputError(f"the plan is for another model: {name} {found}, the plan expects {expected}")


def _child(space: DimensionSpace, heads: str, kind: str) -> str:
    return next(d.name for d in space.dimensions.values() if d.per == heads and d.kind == kind)


def _take_sizes(module: nn.Module, heads: int, qk: int, v: int, *, pruned: bool, library: Any) -> None:
    """Give an attention, whose weights are sliced but whose attributes are not, a forward that takes its sizes.

    Args:
        module: the attention.
        heads: how many heads it has now.
        qk: the size of q and k in each head.
        v: the size of v in each head.
        pruned: whether any of the three is smaller than before; if none is, a class without a forward will do.
        library: the module that has the forwards.

    Raises:
        InputError: there is no such forward for the module's class.
    """
    known = library.FORWARDS
    if type(module) in {forward.sliced for forward in known.values()}:
        return
    forward = known.get(type(module))
    if forward is None:
        if not pruned:
            return
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        raise InputError(
            f"no attention forward takes pruned sizes for {name}; add one to {library.__file__}, "
            f"or search only mlp and width"
        )
    if heads == 0 or not forward.takes(module, heads, qk, v):
        _change_forward(module, forward)


def _change_forward(module: Any, forward: Any) -> None:
    """Change the class and nothing else: weights, names, hooks and scale stay as they are."""
    if forward.scale is not None:
        module.scale = forward.scale(module)
    for name in forward.buffers:
        module.register_buffer(name, None, persistent=False)
    module.__class__ = forward.sliced


def is_bilinear(attention: nn.Module, forwards: str) -> bool:
    """Whether the logits of an attention are products of its q and k as its weights write them."""
    known = _library(forwards).FORWARDS
    own = [f for plain, f in known.items() if type(attention) in (plain, f.sliced)]
    return bool(own) and all(forward.bilinear for forward in own)


def _library(forwards: str, space: DimensionSpace | None = None) -> Any:
    """The module that has the forwards of a family's sublayers."""
    try:
        library = importlib.import_module(forwards)
        if not all(isinstance(forward.sliced, type) for forward in dict(library.FORWARDS).values()):
            raise TypeError(f"the FORWARDS of {forwards} are not of sidt.surgery.attention.Forward")
    except Exception as error:  # whatever a module of somebody's own ends in
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        file = "of the search space" if space is None else f"of {space.own.file if space.own else space.family}"
        raise InputError(
            f"cannot read the attention forwards: {reason}; the section forwards {file} says {forwards!r}, and must "
            f"name a module with FORWARDS"
        ) from None
    return library


def _empty(around: list[nn.Module], dimension: Dimension, library: Any) -> None:
    """Give a sublayer without units, whose weights are sliced, a class that runs without them.

    Args:
        around: the module that the dimension lives in, the one that holds it, and so on outwards.
        dimension: the one that has no unit left.
        library: the module that has the classes.

    Raises:
        InputError: it is an MLP with convolutions, and there is no such class.
    """
    known = getattr(library, "EMPTY", {})
    for module in around:
        if type(module) in known:
            module.__class__ = known[type(module)]
            return
    convolved = any(isinstance(module, nn.Conv2d) and not module.out_channels for module in around[0].modules())
    if dimension.kind == "mlp" and convolved:
        kind = type(around[0])
        raise InputError(
            f"{dimension.name} keeps no unit, but {kind.__module__}.{kind.__qualname__} convolves them; add a class "
            f"that runs without any to EMPTY in {library.__file__}, or keep one (min_units=1)"
        )


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at a path, the one that holds it, and so on outwards."""
    while path:
        yield model.get_submodule(path)
        path = path.rpartition(".")[0]


def follow(module: nn.Module) -> None:
    """Bring the sizes that torch's own layers repeat in step with their weights."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.in_channels and module.groups > 1
        module.out_channels = module.weight.shape[0]
        module.groups = max(module.out_channels, 1) if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(module.weight)
    elif hasattr(module, "normalized_shape"):  # LayerNorm and RMSNorm, torch's and timm's
        module.normalized_shape = tuple(module.get_parameter("weight").shape)  # type: ignore[assignment]


def set_attribute(model: nn.Module, path: str, value: Any) -> None:
    """Set what a dotted path through attributes, list positions and keys leads to."""
    owner, _, leaf = path.rpartition(".")
    target = get_attribute(model, owner) if owner else model
    if isinstance(target, dict):
        target[leaf] = value
    elif isinstance(target, list):
        target[int(leaf)] = value
    elif isinstance(target, tuple):
        set_attribute(model, owner, (*target[: int(leaf)], value, *target[int(leaf) + 1 :]))
    else:
        setattr(target, leaf, value)
