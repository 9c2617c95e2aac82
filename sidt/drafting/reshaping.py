"""Operations that look at a tensor in another shape, take parts of it, or put several together."""

from collections.abc import Callable
from math import prod
from typing import Any

from sidt.drafting.atoms import ONE, Expr
from sidt.drafting.graph import Call

Axes = tuple[Expr, ...]


def _first(call: Call) -> Axes:
    return next(call.seen()).axes


def _inside(call: Call) -> str:
    return f"{call.where}: a concatenation inside a product, which the notation has no words for"


def _reshape(call: Call) -> Axes:
    return reshaped(call, _first(call), call.shapes[0])


def reshaped(call: Call, axes: Axes, shape: tuple[int, ...]) -> Axes:
    """The axes of a tensor in another shape: those that end together are one product, which is split anew."""
    atoms, why = call.atoms, _inside(call)
    old = [(a, n) for a in axes if (n := atoms.extent(a)) != 1]
    found: list[Expr] = []
    new = list(shape)
    while new:
        if new[0] == 1:
            found.append(ONE)
            new.pop(0)
            continue
        merged, sizes = [old.pop(0)], [new.pop(0)]
        while prod(n for _, n in merged) != prod(sizes):
            if prod(n for _, n in merged) < prod(sizes):
                merged.append(old.pop(0))
            else:
                sizes.append(new.pop(0))
        found += atoms.factor(atoms.merge([a for a, _ in merged], why), sizes, why)
    return tuple(found)


def _permute(call: Call) -> Axes:
    axes = _first(call)
    return tuple(axes[d] for d in call.given["dims"])


def _transpose(call: Call) -> Axes:
    axes = list(_first(call))
    a, b = call.given["dim0"], call.given["dim1"]
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _turned(call: Call) -> Axes:
    return _first(call)[::-1]


def _matrix_turned(call: Call) -> Axes:
    *rest, a, b = _first(call)
    return (*rest, b, a)


def _movedim(call: Call) -> Axes:
    axes = _first(call)
    source, to = ([v] if isinstance(v, int) else list(v) for v in (call.given["source"], call.given["destination"]))
    source, to = ([d % len(axes) for d in v] for v in (source, to))
    rest = [d for d in range(len(axes)) if d not in source]
    order = {t: s for s, t in zip(source, to, strict=True)}
    return tuple(axes[order[d] if d in order else rest.pop(0)] for d in range(len(axes)))


def _unsqueeze(call: Call) -> Axes:
    axes = list(_first(call))
    d = call.given["dim"]
    axes.insert(d if d >= 0 else d + len(axes) + 1, ONE)
    return tuple(axes)


def _squeeze(call: Call) -> Axes:
    axes = _first(call)
    if "dim" not in call.given:
        return tuple(a for a in axes if a != ONE)
    over = call.given["dim"]
    over = [d % len(axes) for d in (over if isinstance(over, list | tuple) else [over])]
    return tuple(a for d, a in enumerate(axes) if d not in over or a != ONE)


def _expand(call: Call) -> Axes:
    axes, shape = _first(call), call.shapes[0]
    axes = (ONE,) * (len(shape) - len(axes)) + axes
    return tuple(a if call.atoms.extent(a) == n else call.atoms.fresh(n) for a, n in zip(axes, shape, strict=True))


def _repeat(call: Call) -> Axes:
    axes, shape = _first(call), call.shapes[0]
    axes = (ONE,) * (len(shape) - len(axes)) + axes
    found = []
    for axis, n in zip(axes, shape, strict=True):
        times = n // call.atoms.extent(axis)
        again = call.atoms.fresh(times) if axis == ONE else call.atoms.fresh(times, "it is repeated")
        found.append(axis if times == 1 else call.atoms.merge([again, axis], _inside(call)))
    return tuple(found)


def _repeat_interleave(call: Call) -> Axes:
    axes = list(call.given["self"].axes)
    d = (call.given.get("dim") or 0) % len(axes)
    times = call.shapes[0][d] // call.atoms.extent(axes[d])
    axes[d] = call.atoms.merge([axes[d], call.atoms.fresh(times, "it is repeated")], _inside(call))
    return tuple(axes)


def _pieces(call: Call, axes: Axes, d: int, bounds: list[tuple[int, int]]) -> list[Axes]:
    found = []
    for start, stop in bounds:
        others = [a for at, a in enumerate(axes) if at != d]
        piece, others = call.atoms.take(axes[d], start, stop, others, _inside(call))
        found.append((*others[:d], piece, *others[d:]))
    return found


def _slice(call: Call) -> Axes:
    axes, given = _first(call), call.given
    d, step = (given.get("dim") or 0) % len(axes), given.get("step") or 1
    size, out = call.atoms.extent(axes[d]), call.shapes[0][d]
    if step != 1 and out != size:
        image = call.atoms.of_image(axes[d])
        call.atoms.freeze(axes[d], f"{call.where}: every {step}th unit of it is taken", image)
        return (*axes[:d], call.atoms.fresh(out, f"it comes out of {call.where}", image), *axes[d + 1 :])
    start = given.get("start") or 0
    start = max(start + size, 0) if start < 0 else start
    return _pieces(call, axes, d, [(start, start + out)])[0]


def _select(call: Call) -> Axes:
    axes = _first(call)
    d = call.given["dim"] % len(axes)
    index = call.given["index"] % call.atoms.extent(axes[d])
    found = _pieces(call, axes, d, [(index, index + 1)])[0]
    return (*found[:d], *found[d + 1 :])


def _narrow(call: Call) -> Axes:
    axes, given = _first(call), call.given
    return _pieces(call, axes, given["dim"] % len(axes), [(given["start"], given["start"] + given["length"])])[0]


def _unbind(call: Call) -> list[Axes]:
    axes = _first(call)
    d = (call.given.get("dim") or 0) % len(axes)
    found = _pieces(call, axes, d, [(i, i + 1) for i in range(call.atoms.extent(axes[d]))])
    return [(*piece[:d], *piece[d + 1 :]) for piece in found]


def _chunks(call: Call) -> list[Axes]:
    axes = _first(call)
    d, at, bounds = (call.given.get("dim") or 0) % len(axes), 0, []
    for shape in call.shapes:
        bounds.append((at, at + shape[d]))
        at += shape[d]
    return _pieces(call, axes, d, bounds)


def _cat(call: Call) -> Axes:
    tensors = [t.axes for t in call.given["tensors"] if t.axes]
    d = (call.given.get("dim") or 0) % len(tensors[0])
    beside = [_joined(call, [t[at] for t in tensors]) for at in range(len(tensors[0])) if at != d]
    parts = [t[d] for t in tensors if call.atoms.extent(t[d])]
    if any(call.atoms.of_image(p) and p != ONE for p in parts) or all(p == ONE for p in parts):
        for part in parts:
            call.atoms.freeze(part, f"{call.where}: it stands beside the image's", True)
        whole = call.atoms.fresh(call.shapes[0][d], image=True)
    else:
        whole = tuple(term for part in parts for term in part)
    return (*beside[:d], whole, *beside[d:])


def _joined(call: Call, axes: list[Expr]) -> Expr:
    first = next((a for a in axes if a != ONE), ONE)
    for other in axes:
        if other != first and other != ONE:
            call.atoms.unify(first, other, f"{call.where}: axes of other makes stand side by side")
    return first


def _stack(call: Call) -> Axes:
    tensors = [t.axes for t in call.given["tensors"]]
    found = [_joined(call, list(side)) for side in zip(*tensors, strict=True)]
    found.insert((call.given.get("dim") or 0) % (len(found) + 1), call.atoms.fresh(len(tensors), "they are stacked"))
    return tuple(found)


def _shuffled(call: Call) -> Axes:
    """Blocks of pixels to channels: each channel has its block behind it."""
    axes = _first(call)
    block = call.atoms.fresh(call.given["downscale_factor"] ** 2, image=True)
    return (
        axes[0],
        call.atoms.merge([axes[1], block], _inside(call)),
        *(call.atoms.fresh(n, image=True) for n in call.shapes[0][2:]),
    )


_SHAPES = "view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias"
RESHAPING: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(_SHAPES.split(), _reshape),
    **dict.fromkeys(("permute",), _permute),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    **dict.fromkeys(("t", "numpy_T"), _turned),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _chunks),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "movedim": _movedim,
    "mT": _matrix_turned,
    "adjoint": _matrix_turned,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "repeat_interleave": _repeat_interleave,
    "slice": _slice,
    "select": _select,
    "narrow": _narrow,
    "unbind": _unbind,
    "stack": _stack,
    "pixel_unshuffle": _shuffled,
}
