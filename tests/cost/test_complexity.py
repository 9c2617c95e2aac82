"""Parameters and multiply-adds against numbers worked out here, and against published ones."""

from math import prod

import numpy as np
import pytest
import timm
import torch
from backbones import BACKBONES, MMDET_PVT, PVT, SWIN, SWIN_V2, VIT_TINY, dense, random_plan
from torch import nn

from sidt.cost.complexity import PlanCosts, cost_terms, measure, report, time_forward
from sidt.space.families import KINDS
from sidt.space.space import space_for
from sidt.space.trace import trace

ONE_EACH = pytest.mark.parametrize("backbone", [VIT_TINY, SWIN, SWIN_V2, PVT, MMDET_PVT], ids=str)


def block(width: int, heads: int, tokens: int, window: int) -> tuple[int, int]:
    """DESIGN.md's closed forms for one dense block; ``window`` is how many tokens attend to each other."""
    hidden = 4 * width
    params = 4 * width + (width + 1) * 3 * width + (width + 1) * width + 2 * width * hidden + hidden + width
    attention = tokens * width * 3 * width + 2 * tokens * window * width + tokens * width * width
    return params, attention + 2 * tokens * width * hidden


def deit(width: int, heads: int) -> tuple[int, int]:
    params, macs = block(width, heads, 197, 197)
    params = (16 * 16 * 3 + 1) * width + (1 + 197) * width + 12 * params + 2 * width + (width + 1) * 1000
    return params, 196 * 16 * 16 * 3 * width + 12 * macs + width * 1000


def swin() -> tuple[int, int]:
    params, macs = (4 * 4 * 3 + 1) * 96 + 2 * 96, 56 * 56 * 4 * 4 * 3 * 96
    for stage, depth in enumerate((2, 2, 6, 2)):
        width, heads, side = 96 * 2**stage, 3 * 2**stage, 56 // 2**stage
        if stage:
            params += 4 * (width // 2) * width + 8 * (width // 2)
            macs += (2 * side) ** 2 * (width // 2) * width
        of_block = block(width, heads, side**2, 49)
        params += depth * (of_block[0] + (2 * 7 - 1) ** 2 * heads)
        macs += depth * of_block[1]
    return params + 2 * 768 + 769 * 1000, macs + 768 * 1000


@pytest.mark.parametrize(
    ("name", "closed", "params", "gmacs"),
    [
        ("deit_small_patch16_224", deit(384, 6), 22_050_664, 4.599),
        ("deit_base_patch16_224", deit(768, 12), 86_567_656, 17.564),
        ("swin_tiny_patch4_window7_224", swin(), 28_288_354, 4.491),
    ],
)
def test_published_numbers(name, closed, params, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name)
    counted, described = measure(model), report(space_for(model))
    assert (counted.params, counted.macs) == (described.params, described.macs) == closed
    assert counted.params == params and round(counted.macs / 1e9, 3) == gmacs
    assert counted.input_size == (3, 224, 224) and "softmax" in counted.not_counted


TINY = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 8,
    "num_heads": 2,
    "depth": 1,
    "mlp_ratio": 2,
    "num_classes": 3,
}


def tiny_rows(width: int, heads: int, qk: int, v: int, hidden: int, tokens: int = 5) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of each module of the ViT above, written out."""
    qkv = heads * (2 * qk + v)
    return {
        "cls_token": (width, 0),
        "pos_embed": (tokens * width, 0),
        "patch_embed.proj": (48 * width + width, 4 * 48 * width),
        "blocks.0.norm1": (2 * width, 0),
        "blocks.0.attn.qkv": (width * qkv + qkv, tokens * width * qkv),
        "blocks.0.attn": (0, heads * (qk + v) * tokens * tokens),
        "blocks.0.attn.proj": (heads * v * width + width, tokens * heads * v * width),
        "blocks.0.norm2": (2 * width, 0),
        "blocks.0.mlp.fc1": (width * hidden + hidden, tokens * width * hidden),
        "blocks.0.mlp.fc2": (hidden * width + width, tokens * hidden * width),
        "norm": (2 * width, 0),
        "head": (width * 3 + 3, width * 3),
    }


def test_rows_worked_out_by_hand():
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    space = space_for(model)
    rows = tiny_rows(8, 2, 4, 4, 16)
    assert {r.name: (r.params, r.macs) for r in report(space).rows} == rows
    assert rows["blocks.0.attn.qkv"] == (216, 960) and rows["blocks.0.attn"] == (0, 400)  # numbers to look at
    counted = {r.name: (r.params, r.macs) for r in measure(model).rows}
    assert counted.pop("(root)") == tuple(np.add(rows["cls_token"], rows["pos_embed"]))
    assert counted == {n: r for n, r in rows.items() if n not in ("cls_token", "pos_embed")}

    sizes = {"embed": 6, "heads.0": 1, "qk.0": 2, "v.0": 3, "hidden.0": 5}
    smaller = {r.name: (r.params, r.macs) for r in report(space, sizes).rows}
    assert smaller == tiny_rows(6, 1, 2, 3, 5)

    by_block = {r.name: (r.params, r.macs) for r in report(space, sizes, "block").rows}
    assert by_block["blocks.0"] == tuple(
        sum(r) for r in zip(*(r for n, r in smaller.items() if "blocks" in n), strict=True)
    )
    by_kind = {r.name: (r.params, r.macs) for r in report(space, sizes, "kind").rows}
    assert set(by_kind) == {*KINDS, "(none)"} - {"heads", "channels"}
    assert by_kind["mlp"] == (6 * 5 + 5 + 5 * 6, 2 * 5 * 5 * 6) and by_kind["(none)"] == (3, 0)
    assert by_kind["qk"] == (2 * 2 * 6 + 2 * 2, 5 * 6 * 2 * 2 + 2 * 25)


def sample(space, count: int = 7) -> np.ndarray:
    """The sizes of random plans, shape [plans, dimensions]."""
    return np.array([[*random_plan(space, seed).sizes.values()] for seed in range(count)])


@pytest.mark.parametrize("backbone", BACKBONES, ids=str)
def test_many_plans_at_once_are_the_same_as_one_by_one(backbone):
    space = dense(backbone)[1]
    costs, sizes = PlanCosts(space), sample(space)
    assert (
        costs.names == tuple(space.dimensions)
        and costs.dense.tolist() == costs.of(sizes * 0 + list(space.sizes.values()))[0].tolist()
    )
    together = costs.of(sizes)
    assert together.shape == (7, 2) and together.dtype == np.int64
    assert together.tolist() == [costs.of(row).tolist() for row in sizes]
    assert together[:6].reshape(2, 3, 2).tolist() == costs.of(sizes[:6].reshape(2, 3, -1)).tolist()
    for row, cost in zip(sizes, together.tolist(), strict=True):
        table = report(space, dict(zip(costs.names, row.tolist(), strict=True)))
        assert cost == [table.params, table.macs]
        terms = [(t, prod(int(row[costs.names.index(n)]) for n in t.dimensions)) for t in cost_terms(space)]
        assert cost == [sum(t.params * size for t, size in terms), sum(t.macs * size for t, size in terms)]


@ONE_EACH
def test_savings(backbone):
    costs, space = PlanCosts(dense(backbone)[1]), dense(backbone)[1]
    sizes = np.array(list(space.sizes.values()))
    smaller, which = sample(space, 1)[0], np.array([0, 3, 1, len(sizes) - 1])
    expected = []
    for position in which:
        alone = sizes.copy()
        alone[position] = smaller[position]
        expected.append((costs.of(sizes) - costs.of(alone)).tolist())
    assert costs.savings(sizes, smaller, which).tolist() == expected
    assert (np.max(expected, axis=1) > 0).tolist() == (smaller < sizes)[which].tolist()


@ONE_EACH
def test_coupled_dimensions_are_those_that_change_each_others_price(backbone):
    """Brute force: two dimensions are coupled if halving both does not save what halving each alone saves."""
    costs, space = PlanCosts(dense(backbone)[1]), dense(backbone)[1]
    sizes = np.array(list(space.sizes.values()))
    count = len(sizes)

    def saved(*which):
        changed = sizes.copy()
        changed[list(which)] -= 1
        return costs.dense - costs.of(changed)

    alone = [saved(i) for i in range(count)]
    coupled = costs.coupled()
    for i in range(count):
        for j in range(i):
            assert coupled[i, j] == coupled[j, i] == (saved(i, j) != alone[i] + alone[j]).any()


def test_measure_counts_any_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.Flatten(), nn.Linear(4 * 36, 2, bias=False))
    table = measure(model, (3, 6, 6))
    assert [(r.name, r.params, r.macs) for r in table.rows] == [("0", 112, 36 * 108), ("2", 288, 288)]
    assert table.latency_ms is None and table.model == "Sequential"


class Detector(nn.Module):
    """Parts in a list, a weight used in halves, and torch's attention; called part by part, never as a whole."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(3, 4, 2, stride=2), nn.Linear(4, 6)])
        self.attention = nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True)


def run_detector(model, image):
    tokens = model.parts[0](image).flatten(2).transpose(1, 2)  # [1, 9, 4]
    first, second = model.parts[1].weight.split([2, 4])
    of_all, of_five = nn.functional.linear(tokens, first), nn.functional.linear(tokens[:, :5], second)
    model.attention(torch.cat([of_all[:, :5], of_five], dim=-1), tokens[:, :2], tokens[:, :2])


def test_a_trace_of_a_forward_of_ones_own():
    seen = trace(Detector(), (3, 6, 6), forward=run_detector)
    assert seen.positions == {
        "parts.0.weight": ((0, 4, 9),),
        "parts.1.weight": ((0, 2, 9), (2, 6, 5)),
        "attention.q_proj_weight": ((0, 6, 5),),
        "attention.k_proj_weight": ((0, 6, 2),),
        "attention.v_proj_weight": ((0, 6, 2),),
        "attention.out_proj.weight": ((0, 6, 5),),
    }
    conv, halves = 9 * 4 * 12, 4 * (9 * 2 + 5 * 4)
    attention = 5 * 6 * 6 + 2 * (2 * 6 * 4) + 2 * 6 * 5 * 2 + 5 * 6 * 6  # q, k and v, the two products, the output
    assert seen.module_macs[""] == conv + halves + attention
    # The two halves are products of the model's own forward, not of the layer whose weight they use.
    assert {n: m for n, m in seen.module_macs.items() if m and n} == {
        "parts": conv,
        "parts.0": conv,
        "attention": attention,
    }


def test_measure_needs_an_image_size_that_fits(refused):
    with refused("Sequential", "image size"):
        measure(nn.Sequential(nn.Linear(3, 2)))
    with refused("VisionTransformer", "3x10x10"):
        measure(dense(VIT_TINY)[0], (3, 10, 10))


def test_latency():
    model = VIT_TINY.build()
    for training in (True, False):
        model.train(training)
        assert time_forward(model, (3, 64, 64), batch=2, seconds=0.01) > 0
        assert model.training is training
    assert time_forward(model.double(), (3, 64, 64), seconds=0.01) > 0
    with pytest.raises(AssertionError):  # timm's own: the image is too small
        time_forward(model.train(), (3, 8, 8), seconds=0.01)
    assert model.training
