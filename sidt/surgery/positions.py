"""Positions that a model gives all its attentions, of the dense model's heads: each picks those of its own.

Rotary positions turn pairs of rows of q and of k, each by an angle of its own: rows u and u + half of the head
("halves", DINOv3), or neighbours ("interleaved", EVA-02). A pair goes as a whole, and each head keeps its own, so the
sines and cosines that the model gives all heads are picked for each. Biases that all blocks share (BEiT) are picked by
head. What to pick are buffers of the attention, which are no part of its state dict: slicing by the plan makes them
again.

RoFormer: Enhanced Transformer with Rotary Position Embedding, Su et al. 2021.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from sidt.space.axes import Term, kept_indices, term_size
from sidt.space.plan import DimensionPlan

ROTARY = ("turned_heads", "turned")  # of a rotary attention; None: all of them
SHARED = ("own_heads",)  # of one that reads biases which all blocks share


def own_angles(rope: Tensor, heads: Tensor | None, rows: Tensor | None, count: int) -> Tensor:
    """The angles of the rows that an attention has.

    Args:
        rope: sines and cosines of the dense model's rows, [..., N, 2 * rows]; before N there may be its heads.
        heads: which of these the attention has, [heads]; ``None``: all.
        rows: which rows of a head each of its rows is, [heads * kept]; ``None``: all, in order.
        count: its heads.

    Returns:
        [..., N, 2 * rows], or [..., heads, N, 2 * kept] if it has not all rows.
    """
    if heads is not None and rope.dim() > 2 and rope.shape[-3] > 1:
        rope = rope.index_select(-3, heads)
    if rows is None:
        return rope
    if rope.dim() == 2:
        rope = rope.unsqueeze(0)
    own = rows.view(count, 1, -1)
    own = torch.cat([own, own + rope.shape[-1] // 2], dim=-1)
    shape = list(rope.shape)
    shape[-3] = count
    rope = rope.expand(shape)
    shape[-1] = own.shape[-1]
    return rope.gather(-1, own.expand(shape))


def turned(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """[B, heads, N, qk] with rotary positions, but for the tokens of the prefix; ``rope`` is sine and cosine."""
    rest = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
    return torch.cat([x[:, :, :prefix], rest], dim=2).type_as(x)


def own_biases(biases: Tensor, heads: Tensor | None) -> Tensor:
    """[..., heads of a dense block, N, N], which all blocks share, for those that an attention has; ``None``: all."""
    return biases if heads is None else biases.index_select(-3, heads)


def rows_of(plan: DimensionPlan, heads: str, qk: str) -> Term:
    """How the rows of q stand in its weight: the product of heads and q/k units, and of 2 if a unit is a pair."""
    terms = (t for place in plan.space.places.values() for axis in place.axes for t in axis)
    return next((t for t in terms if heads in t and qk in t), (heads, qk))


def remember(module: Any, buffers: Sequence[str], plan: DimensionPlan, heads: str, qk: str) -> None:
    """Give an attention the buffers that say which heads and rows of the model before it has.

    Args:
        module: the attention, whose weights are sliced; those of its buffers that were there are too.
        buffers: which of them it has.
        plan: by which.
        heads: its heads.
        qk: its q/k units.
    """
    space, term = plan.space, rows_of(plan, heads, qk)
    size = term_size(term, space.sizes) // max(space.sizes[heads], 1)
    rows = kept_indices((term,), space.sizes, plan.keep, space.per) % max(size, 1)
    pairs = any(type(s) is int for s in term)
    for name in buffers:
        dimension, kept = (qk, rows) if name == "turned" else (heads, plan.keep[heads])
        whole = plan.sizes[dimension] == space.sizes[dimension] or not (pairs or name in SHARED)
        if getattr(module, name) is None:
            own = None if whole else torch.from_numpy(kept).to(next(module.parameters()).device)
            module.register_buffer(name, own, persistent=False)
