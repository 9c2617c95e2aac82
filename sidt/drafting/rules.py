"""What each operation does to the axes of tensors; one that no rule is for freezes what it touches."""

from collections.abc import Callable
from math import prod
from typing import Any

from sidt.drafting.atoms import ONE, Expr
from sidt.drafting.contractions import CONTRACTIONS
from sidt.drafting.graph import Call, Seen
from sidt.drafting.reshaping import RESHAPING

Axes = tuple[Expr, ...]
Rule = Callable[[Call], Any]


def apply(call: Call) -> Any:
    """What comes out of an operation: a tensor seen, several, or anything else as it is."""
    name = call.name.removeprefix("pointwise:").rstrip("_")
    if name == "getitem":
        return call.given["0"][call.given["1"]]
    if not call.shapes:
        return None
    rule = RULES.get(name)
    if rule is None and call.name.startswith("pointwise:"):
        rule = _pointwise
    inputs = list(call.seen())
    if rule is None:
        return _unknown(call, inputs)
    try:
        found = rule(call)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):  # a form of it that no rule is for
        return _unknown(call, inputs)
    several = found if isinstance(found, list) else [found]
    if tuple(tuple(map(call.atoms.extent, axes)) for axes in several) != call.shapes:
        return _unknown(call, inputs)
    if isinstance(found, list):
        return [Seen(axes) for axes in found]
    pure = name in VIEWS and len(inputs) == 1 and inputs[0].pure
    return Seen(found, pure)


def _unknown(call: Call, inputs: list[Seen]) -> Any:
    """Freeze what an operation touches."""
    atoms = call.atoms
    touched = [a for tensor in inputs for a in tensor.axes if not all(map(atoms.is_frozen, atoms.leaves(a)))]
    if touched:
        call.forward.unknown.setdefault(call.name, call.where)
    image = bool(inputs) and not touched
    for axis in touched:
        atoms.freeze(axis, f"{call.where}: no rule is for this operation")
    found = [Seen(tuple(atoms.fresh(n, f"it comes out of {call.where}", image) for n in s)) for s in call.shapes]
    return found if len(found) > 1 else found[0]


def broadcast(call: Call, tensors: list[Axes]) -> Axes:
    """Join the axes that are side by side, from the last."""
    rank, found = max(map(len, tensors), default=0), []
    for at in range(rank, 0, -1):
        side = [axes[-at] for axes in tensors if len(axes) >= at and axes[-at] != ONE]
        for other in side[1:]:
            call.atoms.unify(side[0], other, f"{call.where}: axes of other makes stand side by side")
        found.append(side[0] if side else ONE)
    return tuple(found)


def _pointwise(call: Call) -> Axes:
    return broadcast(call, [tensor.axes for tensor in call.seen()])


def _same(call: Call) -> Axes:
    axes: Axes = next(call.seen()).axes
    return axes


def _made(call: Call) -> Axes:
    """Of nothing: its axes take what they meet."""
    return tuple(call.atoms.fresh(n) for n in call.shapes[0])


def _counted(call: Call) -> Axes:
    return tuple(call.atoms.fresh(n, "it is a constant") for n in call.shapes[0])


# --- norms and reductions --------------------------------------------------------------------------------------------


def _layer_norm(call: Call) -> Any:
    given, axes = call.given, call.given["input"].axes
    inner = axes[-len(given["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if given.get(name) is not None:
            for axis, other in zip(inner, given[name].axes, strict=True):
                call.atoms.unify(axis, other, call.where)
    call.forward.statistics += [(axis, call.where) for axis in inner]
    return axes


def _group_norm(call: Call) -> Axes:
    axes: Axes = call.given["input"].axes
    for name in ("weight", "bias"):
        if call.given.get(name) is not None:
            call.atoms.unify(axes[1], call.given[name].axes[0], call.where)
    if call.given["num_groups"] == 1:
        call.forward.statistics.append((axes[1], call.where))
    else:
        call.atoms.freeze(axes[1], f"{call.where}: statistics over groups of it")
    return axes


def _batch_norm(call: Call) -> Any:
    axes = call.given["input"].axes
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.given.get(name) is not None:
            call.atoms.unify(axes[1], call.given[name].axes[0], call.where)
    return axes


def dims(value: Any, rank: int) -> list[int]:
    """Positions of axes, from the first."""
    values = range(rank) if value is None or value == [] else value if isinstance(value, list | tuple) else [value]
    return [d % rank for d in values] if rank else []


def _softmax(call: Call) -> Axes:
    axes = next(call.seen()).axes
    for d in dims(call.given["dim"], len(axes)):
        call.atoms.freeze(axes[d], f"{call.where}: its entries are weighed against each other")
    return axes


def _reduced(call: Call, mark: Callable[[Expr], None]) -> Any:
    axes = next(call.seen()).axes
    over = dims(call.given.get("dim"), len(axes))
    for d in over:
        if not call.atoms.of_image(axes[d]):
            mark(axes[d])
    keep = len(call.shapes[0]) == len(axes)
    found = tuple(ONE if d in over else axis for d, axis in enumerate(axes) if keep or d not in over)
    return found if len(call.shapes) == 1 else [found] * len(call.shapes)


def _statistic(call: Call) -> Any:
    return _reduced(call, lambda axis: call.forward.statistics.append((axis, call.where)))


def _sum(call: Call) -> Any:
    return _reduced(call, lambda axis: call.forward.sums.append((axis, call.where)))


def _extreme(call: Call) -> Any:
    return _reduced(call, lambda axis: call.atoms.freeze(axis, f"{call.where}: its largest or smallest is read"))


# --- maps and indices ------------------------------------------------------------------------------------------------


def _resized(call: Call) -> Any:
    """Pooling and interpolation: the last axes are positions, or are frozen."""
    axes = next(call.seen()).axes
    found = list(axes)
    for d in range(2, len(axes)):
        if call.atoms.extent(axes[d]) != call.shapes[0][d] or not call.atoms.of_image(axes[d]):
            call.atoms.freeze(axes[d], f"{call.where}: it is resized", True)
            found[d] = call.atoms.fresh(call.shapes[0][d], image=True)
    return tuple(found) if len(call.shapes) == 1 else [tuple(found)] * len(call.shapes)


def _padded(call: Call) -> Axes:
    axes, pad, found = next(call.seen()).axes, list(call.given["pad"]), []
    for d, axis in enumerate(axes):
        at = 2 * (len(axes) - 1 - d)
        if any(pad[at : at + 2]):
            call.atoms.freeze(axis, f"{call.where}: it is padded", call.atoms.of_image(axis))
            axis = call.atoms.fresh(call.shapes[0][d], f"{call.where}: it is padded", call.atoms.of_image(axis))
        found.append(axis)
    return tuple(found)


def _moved(call: Call) -> Axes:
    axes = next(call.seen()).axes
    for d in dims(call.given["dims"], len(axes)):
        call.atoms.freeze(axes[d], f"{call.where}: its units change places")
    return axes


def _index(call: Call) -> Axes:
    axes, indices = call.given["self"].axes, call.given["indices"]
    taken = [d for d, index in enumerate(indices) if index is not None]
    for d in taken:
        call.atoms.freeze(axes[d], f"{call.where}: its units are looked up", call.atoms.of_image(axes[d]))
    new = len(call.shapes[0]) - (len(axes) - len(taken))
    looked = [call.atoms.fresh(n, "it is looked up", True) for n in call.shapes[0]]
    side_by_side = taken == list(range(taken[0], taken[0] + len(taken)))
    at = taken[0] if side_by_side else 0
    rest = [axis for d, axis in enumerate(axes) if d not in taken]
    return (*rest[:at], *looked[at : at + new], *rest[at:])


def _index_select(call: Call) -> Axes:
    axes = list(call.given["self"].axes)
    d = call.given["dim"] % len(axes)
    call.atoms.freeze(axes[d], f"{call.where}: its units are looked up", call.atoms.of_image(axes[d]))
    axes[d] = call.atoms.fresh(call.shapes[0][d], "it is looked up", True)
    return tuple(axes)


def _embedding(call: Call) -> Axes:
    table = call.given["weight"].axes
    call.atoms.freeze(table[0], f"{call.where}: its units are looked up", True)
    return (*(call.atoms.fresh(n, image=True) for n in call.shapes[0][:-1]), table[1])


def _columns(call: Call) -> Axes:
    """Unfold: each channel has its window beside it."""
    axes, kernel = call.given["self"].axes, prod(call.given["kernel_size"])
    channels = call.atoms.merge([axes[1], call.atoms.fresh(kernel, "it is a window", True)], call.where)
    return (axes[0], channels, call.atoms.fresh(call.shapes[0][2], image=True))


def _folded(call: Call) -> Axes:
    axes, kernel = call.given["self"].axes, prod(call.given["kernel_size"])
    length = call.atoms.extent(axes[1]) // kernel
    channels, window = call.atoms.factor(axes[1], [length, kernel], call.where)
    call.atoms.freeze(window, f"{call.where}: it is a window", True)
    return (axes[0], channels, *(call.atoms.fresh(n, image=True) for n in call.shapes[0][2:]))


VIEWS = {"view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "contiguous", "clone"}
VIEWS |= {"to", "numpy_T", "flatten", "unflatten", "detach", "alias", "_to_copy", "index", "index_select", "slice"}
VIEWS |= {"select", "expand_as", "view_as", "reshape_as", "type_as", "narrow", "upsample_bicubic2d", "movedim"}
_SAME = (
    "contiguous clone detach detach_ alias dropout to _to_copy lift_fresh_copy type_as feature_dropout alpha_dropout"
)
_MADE = "zeros ones full empty new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like"
_NUMBERS = "arange linspace scalar_tensor tril_indices triu_indices eye randint rand randn randperm one_hot"
_RESIZED = (
    "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d adaptive_avg_pool1d max_pool1d "
    "upsample_bicubic2d upsample_bilinear2d upsample_nearest2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa "
    "max_pool2d_with_indices grid_sampler avg_pool3d max_pool3d upsample_nearest1d upsample_linear1d"
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_MADE.split(), _made),
    **dict.fromkeys(_NUMBERS.split(), _counted),
    **dict.fromkeys(_RESIZED.split(), _resized),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _layer_norm),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "flip"), _softmax),
    **dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean"), _statistic),
    **dict.fromkeys(("sum", "linalg_vector_norm", "norm"), _sum),
    **dict.fromkeys(("amax", "amin", "max", "min", "argmax", "argmin", "any", "all"), _extreme),
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _padded),
    "group_norm": _group_norm,
    "roll": _moved,
    "index": _index,
    "index_select": _index_select,
    "embedding": _embedding,
    "im2col": _columns,
    "col2im": _folded,
    **RESHAPING,
    **CONTRACTIONS,
}
RULES["flip"] = _moved
RULES |= dict.fromkeys(
    ("hardswish", "hardsigmoid", "hardtanh", "relu6", "mish"), _pointwise
)  # torch has no tag on them
