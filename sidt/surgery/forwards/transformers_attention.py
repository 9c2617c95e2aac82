"""What the attentions of Hugging Face's models share: how they are computed is a setting of the model's config."""

from collections.abc import Callable
from typing import Any

import torch.fx
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sidt.surgery.attention import attend

torch.fx.wrap("attend")  # torch.fx looks for it in each module that calls it


def in_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * size] -> [B, heads, N, size]."""
    return x.unflatten(-1, [heads, -1]).transpose(1, 2)


def attend_as(
    module: Any,
    eager: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the config of a module says, for q, k of [B, heads, N, qk] and v of [B, heads, N, v].

    Args:
        module: the attention.
        eager: the function of its library's file for ``attn_implementation="eager"``, which gives the weights too.
        q: queries.
        k: keys.
        v: values.
        mask: what is added to the logits.
        scale: of the dense model's logits.
        dropout: of the weights of attention.
        kwargs: what the model passes on to such functions.

    Returns:
        [B, N, heads, v], and the weights of attention or ``None``.
    """
    implementation = module.config._attn_implementation
    if implementation == "sdpa":
        return attend(q, k, v, scale, mask, dropout).transpose(1, 2), None
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    out, weights = interface(module, q, k, v, mask, dropout=dropout, scaling=scale, **kwargs)
    return out, weights


def of_one_size(module: Any, heads: int, qk: int, v: int) -> bool:
    """Takes any number of heads, if q/k and v have one size: the scale is the dense model's."""
    return qk == v
