"""Linear layers, convolutions and matrix products: what they read is joined, what they give is the weight's."""

from collections.abc import Callable, Sequence
from typing import Any

from sidt.drafting.atoms import ONE, Expr
from sidt.drafting.graph import Call, Product, Seen

Axes = tuple[Expr, ...]


def _join(call: Call, one: Expr, other: Expr) -> Expr:
    """Join two axes of which either may have one unit for all of the other's."""
    if ONE in (one, other):
        return other if one == ONE else one
    call.atoms.unify(one, other, f"{call.where}: axes of other makes meet")
    return one


def _linear(call: Call) -> Axes:
    given = call.given
    out, *inside = given["weight"].axes
    axes = given["input"].axes
    _join(call, axes[-1], inside[0])
    if given.get("bias") is not None:
        out = _join(call, out, given["bias"].axes[0])
    return (*axes[:-1], out)


def _convolution(call: Call) -> Axes:
    given, axes, atoms = call.given, call.given["input"].axes, call.atoms
    weight, groups = given["weight"].axes, given.get("groups", 1)
    transposed = bool(given.get("transposed")) or "transpose" in call.name
    out, inside = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    for position in (*axes[2:], *weight[2:]):
        atoms.freeze(position, "it is a position", True)
    if groups == 1:
        _join(call, axes[1], inside)
    elif atoms.extent(axes[1]) == groups == atoms.extent(out) and not transposed:
        _join(call, out, axes[1])
    elif transposed:
        for axis in (axes[1], *weight):
            atoms.freeze(axis, f"{call.where}: a transposed convolution of groups")
    else:
        why = f"{call.where}: a convolution of {groups} groups"
        behind, per_group = (atoms.extent(a) // groups for a in (axes[1], out))
        first, units = atoms.factor(axes[1], [groups, behind], why)
        _join(call, units, inside)
        _join(call, first, atoms.factor(out, [groups, per_group], why)[0])
        atoms.freeze(first, why)
    if given.get("bias") is not None:
        out = _join(call, out, given["bias"].axes[0])
    return (axes[0], out, *(atoms.fresh(n, image=True) for n in call.shapes[0][2:]))


# --- products of two tensors -----------------------------------------------------------------------------------------


def _product(call: Call, tensors: Sequence[Seen], batch: Axes, contracted: Expr, left: Axes) -> None:
    """Note a product that is of no parameter: one of an attention."""
    if not any(t.pure for t in tensors):
        call.forward.products.append(Product(call.owner, batch, contracted, left))


def _matmul(call: Call) -> Axes:
    one, other = list(call.seen())[-2:]
    return multiplied(call, one, other)


def multiplied(call: Call, one: Seen, other: Seen) -> Axes:
    """[..., n, d] times [..., d, m]; vectors are taken as torch does."""
    a, b = one.axes, other.axes
    a, b = (ONE, *a) if len(a) == 1 else a, (*b, ONE) if len(b) == 1 else b
    contracted = _join(call, a[-1], b[-2])
    rank = max(len(a), len(b)) - 2
    sides = [(ONE,) * (rank - len(axes) + 2) + axes[:-2] for axes in (a, b)]
    batch = tuple(_join(call, x, y) for x, y in zip(*sides, strict=True))
    left = (() if len(one.axes) == 1 else (a[-2],)) + (() if len(other.axes) == 1 else (b[-1],))
    _product(call, (one, other), batch, contracted, left)
    return (*batch, *left)


def _addmm(call: Call) -> Axes:
    first, one, other = call.seen()
    found = multiplied(call, one, other)
    for a, b in zip(first.axes[::-1], found[::-1], strict=False):
        _join(call, a, b)
    return found


def _einsum(call: Call) -> Axes:
    equation, tensors = call.given["equation"].replace(" ", ""), [t for t in call.given["tensors"]]
    read, _, gives = equation.partition("->")
    letters: dict[str, Expr] = {}
    words = read.split(",")
    dots = max(
        (len(t.axes) - len(w.replace("...", "")) for w, t in zip(words, tensors, strict=True) if "..." in w), default=0
    )
    stand = "".join(chr(0x391 + i) for i in range(dots))
    words, gives = [w.replace("...", stand) for w in words], gives.replace("...", stand)
    for word, tensor in zip(words, tensors, strict=True):
        for letter, axis in zip(word, tensor.axes, strict=True):
            letters[letter] = _join(call, letters.get(letter, ONE), axis)
    if len(words) == 2:
        both = [x for x in letters if all(x in w for w in words)]
        batch = tuple(letters[x] for x in both if x in gives)
        left = tuple(letters[x] for x in gives if x not in both)
        for x in letters:
            if x not in gives:
                _product(call, tensors, batch, letters[x], left)
    return tuple(letters[x] for x in gives)


def _attention(call: Call) -> Any:
    """Scaled dot-product attention of [..., n, qk], [..., m, qk] and [..., m, v]."""
    given, atoms = call.given, call.atoms
    q, k, v = (given[name].axes for name in ("query", "key", "value"))
    rank = len(q) - 2
    if len({atoms.extent(t[-3]) for t in (q, k, v) if rank}) > 1:
        for axis in (q[-3], k[-3], v[-3]):
            atoms.freeze(axis, f"{call.where}: k and v have fewer heads than q")
    batch = tuple(
        _join(call, _join(call, a, b), c) if atoms.extent(a) == atoms.extent(b) == atoms.extent(c) else a
        for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True)
    )
    size, tokens = _join(call, q[-1], k[-1]), _join(call, k[-2], v[-2])
    atoms.freeze(tokens, f"{call.where}: its entries are weighed against each other", True)
    if given.get("attn_mask") is not None:
        logits = (*batch, q[-2], tokens)
        mask = given["attn_mask"].axes
        for a, b in zip(mask[::-1], logits[::-1], strict=False):
            _join(call, a, b)
    tensors = [given[name] for name in ("query", "key", "value")]
    _product(call, tensors[:2], batch, size, ())
    _product(call, tensors[2:], batch, tokens, (v[-1],))
    return (*batch, q[-2], v[-1])


_PRODUCTS = "matmul bmm mm mv"
CONTRACTIONS: dict[str, Callable[[Call], Any]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d"), _convolution),
    **dict.fromkeys(_PRODUCTS.split(), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
