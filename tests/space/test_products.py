"""What the products of a forward follow, against their sizes written out."""

import timm
import torch
from torch import nn

from sidt.space.trace import trace

HEADS, QK, V, SIDE = 3, 5, 4, 6
TOKENS = SIDE * SIDE


class Attention(nn.Module):
    """q by k, q by a table of positions, and a bias that is looked up by products of a table with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, HEADS * size, bias=False) for size in (QK, QK, V))
        self.positions = nn.Parameter(torch.ones(SIDE, QK))
        self.table = nn.Parameter(torch.ones(HEADS, 2 * SIDE - 1))
        self.register_buffer("lookup", torch.ones(SIDE, SIDE, 2 * SIDE - 1))
        self.mix = nn.Linear(HEADS, HEADS)  # between the softmax and v

    def forward(self, image):
        tokens = image.flatten(2).transpose(1, 2)  # not contiguous: torch makes its layers products of batches
        q, k, v = (m(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        rows = torch.einsum("bhnc,wc->bhnw", q, self.positions)
        bias = torch.einsum("ht,xyt->hxy", self.table, self.lookup)
        logits = q @ k.transpose(-2, -1) + rows.repeat(1, 1, 1, SIDE) + bias.repeat(1, SIDE, SIDE)
        weights = self.mix(logits.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (weights @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.pool = nn.MultiheadAttention(HEADS * V, 2, batch_first=True)

    def forward(self, image):
        x = self.attn(image)
        return self.pool(x, x, x)[0]


def test_products_by_what_they_follow():
    seen = trace(Model().eval(), (3, SIDE, SIDE))
    pooled = TOKENS * TOKENS * HEADS * V
    assert seen.products_in("attn") == {
        "qk": HEADS * QK * TOKENS * (TOKENS + SIDE),
        "v": HEADS * V * TOKENS**2,
        "heads": HEADS * SIDE**2 * (2 * SIDE - 1),
    }
    assert seen.products_in("pool") == {"qk": pooled, "v": pooled}
    layers = 3 * TOKENS * HEADS * (2 * QK + V) + TOKENS**2 * HEADS**2 + 4 * TOKENS * (HEADS * V) ** 2
    assert seen.module_macs[""] == layers + seen.products_in("attn").total() + 2 * pooled


def test_the_relative_positions_of_sam():
    seen = trace(timm.create_model("samvit_base_patch16", depth=1, img_size=64).eval())
    windows, side, heads, size = 1, 14, 12, 64  # one window, which the image of 4 x 4 patches is padded to
    pairs = windows * heads * size * side**4
    assert seen.products_in("blocks.0.attn") == {"qk": pairs + 2 * windows * heads * size * side**3, "v": pairs}
