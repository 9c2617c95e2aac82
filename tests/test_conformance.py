"""One suite for every search space: what must hold for any backbone and any plan."""

import copy
import re
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from backbones import BACKBONES, Backbone, dense, random_plan, sublayers
from safetensors.torch import load, save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sidt.cost.complexity import PlanCosts, measure, report
from sidt.space.families import INNER_KINDS, KINDS
from sidt.space.finding import families
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for
from sidt.surgery.slicing import mask_model, slice_model

SEEDS = range(3)
EMPTY = ("apart", "together")  # sublayers that lose all their units
PLANS = (*SEEDS, *EMPTY)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=BACKBONES, ids=str)
def backbone(request):
    return request.param


def plan_of(space: DimensionSpace, which: int | str, kinds=KINDS) -> DimensionPlan:
    """The plan of a seed, or one that also empties sublayers."""
    return random_plan(space, 0, kinds, sublayers(space, which)) if which in EMPTY else random_plan(space, which, kinds)


@cache
def sliced_by(backbone: Backbone, which: int | str, kinds=KINDS) -> tuple[DimensionPlan, nn.Module]:
    model, space = dense(backbone)
    plan = plan_of(space, which, kinds)
    return plan, slice_model(model, plan)


@torch.no_grad()
def run(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a model gives: logits, or a map for each stage."""
    return outputs_of(model(images))


def outputs_of(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def same(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def gap(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> float:
    """The smallest, over all outputs, of how far they are apart anywhere."""
    return min((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def real_macs(model: nn.Module, images: torch.Tensor) -> int:
    """PyTorch's own counter on a real forward; the math backend shows attention as its two products."""
    still = copy.deepcopy(model).requires_grad_(False)  # the counter takes no view of a parameter that learns
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(still, images)
    return counter.get_total_flops() // 2


def predicted(backbone: Backbone, plan: DimensionPlan) -> list[int]:
    costs = PlanCosts(dense(backbone)[1])
    return costs.of(np.array([plan.sizes[name] for name in costs.names])).tolist()


def test_a_random_plan_is_a_hard_case(backbone):
    """What the other tests stand on: every dimension that can shrink does, and q/k and v sizes differ."""
    _, space = dense(backbone)
    for seed in SEEDS:
        sizes = random_plan(space, seed).sizes
        free = [d for d in space.dimensions.values() if not d.fixed and d.size > 1]
        assert {d.kind for d in free} >= {"width", "heads", "v"} - (
            {"heads", "v"} if "beit3" in str(backbone) else set()
        )
        assert all(sizes[d.name] < d.size for d in free)
        qk = [d.name for d in free if d.kind == "qk"]
        assert all(sizes[name] != sizes[name.replace("qk", "v")] for name in qk)


def test_full_plan_is_bit_identical(backbone):
    model, space = dense(backbone)
    full = slice_model(model, DimensionPlan(space, {}))
    assert same(run(full, backbone.images()), run(model, backbone.images()))
    assert predicted(backbone, DimensionPlan(space, {})) == [
        count(model),
        real_macs(model, backbone.images(1)),
    ]


def test_a_plan_empties_sublayers(backbone, refused):
    """The other tests of such plans stand on this: heads, MLP or both are gone, but for norms over all of them."""
    _, space = dense(backbone)
    for which in EMPTY:
        plan = plan_of(space, which)
        gone = {name for name, size in plan.sizes.items() if not size}
        assert gone == sublayers(space, which)
        may = {d.kind for d in space.dimensions.values() if d.kind in ("heads", "mlp") and not d.fixed}
        assert {space.dimensions[name].kind for name in gone} == may
        assert may == {"heads", "mlp"} or "beit3" in str(backbone) or "eva02_base" in str(backbone)
    for dimension in space.dimensions.values():
        if dimension.kind not in ("heads", "mlp") or dimension.fixed:
            rows = () if dimension.per is None else (space.sizes[dimension.per],)
            with refused(dimension.name):
                DimensionPlan(space, {dimension.name: np.empty((*rows, 0), dtype=int)})


@pytest.mark.parametrize("which", PLANS)
def test_masked_is_sliced(backbone, which):
    model, _ = dense(backbone)
    plan, sliced = sliced_by(backbone, which, INNER_KINDS)
    images = backbone.images()
    masked = run(mask_model(model, plan), images)
    assert_close(run(sliced, images), masked, **TOLERANCE)
    assert gap(masked, run(model, images)) > 1e-2 and count(sliced) < count(model)


class KeptNorm(nn.Module):
    """A norm whose statistics see only some of the positions; the others come out as zero."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen, size, weight = x[..., self.kept], (len(self.kept),), self.norm.weight[self.kept]
        if isinstance(self.norm, nn.LayerNorm):
            seen = F.layer_norm(seen, size, weight, self.norm.bias[self.kept], self.norm.eps)
        else:
            seen = F.rms_norm(seen, size, weight, self.norm.eps)
        out = torch.zeros_like(x)
        out[..., self.kept] = seen
        return out


def with_kept_norms(model: nn.Module, plan: DimensionPlan) -> nn.Module:
    """The dense model with the dropped width zeroed, and each norm over a width looking at the kept units."""
    masked = mask_model(model, plan)
    norms = [n for n, m in masked.named_modules() if isinstance(m, nn.LayerNorm) or type(m).__name__ == "RmsNorm"]
    for name in norms:
        (term,) = plan.space.places[f"{name}.weight"].axes[0]
        dimension = next(symbol for symbol in term if isinstance(symbol, str))
        if plan.space.dimensions[dimension].kind == "width":
            # PatchMerging's norm is over four pixels: timm has the channels of a pixel side by side, and
            # MMDetection the pixels of a channel.
            size, keep = plan.space.sizes[dimension], plan.keep[dimension]
            pixels = np.arange(next((symbol for symbol in term if isinstance(symbol, int)), 1))
            kept = pixels[:, None] * size + keep if term[-1] == dimension else keep[:, None] * len(pixels) + pixels
            masked.set_submodule(name, KeptNorm(masked.get_submodule(name), torch.from_numpy(kept.ravel())))
    assert any(isinstance(m, KeptNorm) for m in masked.modules())
    return masked


def kept_channels(outputs: tuple[torch.Tensor, ...], plan: DimensionPlan) -> tuple[torch.Tensor, ...]:
    """Of a map of each stage, the channels that the plan keeps; logits as they are."""
    if outputs[0].ndim == 2:
        return outputs
    return tuple(y[:, plan.keep[f"embed.{stage}"]] for stage, y in enumerate(outputs))


@pytest.mark.parametrize("kinds", [("width",), KINDS], ids=["width", "all"])
@pytest.mark.parametrize("which", PLANS)
def test_width_sliced_is_norms_over_the_kept_units(backbone, which, kinds):
    model, _ = dense(backbone)
    plan, sliced = sliced_by(backbone, which, kinds)
    images = backbone.images()
    expected = kept_channels(run(with_kept_norms(model, plan), images), plan)
    assert_close(run(sliced, images), expected, **TOLERANCE)
    masked = kept_channels(run(mask_model(model, plan), images), plan)
    assert gap(masked, expected) > 1e-3  # the statistics matter
    assert count(sliced) < count(model)


@pytest.mark.parametrize("which", PLANS)
def test_predicted_is_counted(backbone, which):
    plan, sliced = sliced_by(backbone, which)
    assert predicted(backbone, plan) == [count(sliced), real_macs(sliced, backbone.images(1))]
    rows = {by: report(dense(backbone)[1], plan.sizes, by) for by in ("module", "block", "kind")}
    for by, table in rows.items():
        assert [table.params, table.macs] == predicted(backbone, plan), by
    assert len(rows["module"].rows) > len(rows["block"].rows) > 3
    assert "(other)" not in {row.name for row in rows["module"].rows}
    measured = measure(sliced, backbone.input_size)
    assert [measured.params, measured.macs] == predicted(backbone, plan)
    assert min(min(row.params, row.macs) for row in measured.rows) >= 0


def test_the_sliced_model_has_the_space_of_the_plan(backbone):
    for which in PLANS:
        plan, sliced = sliced_by(backbone, which)
        assert space_for(sliced, backbone.input_size).sizes == plan.sizes


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, "apart"), ("together", 1), ("apart", "together")])
def test_slicing_twice_is_slicing_by_the_composed_plan(backbone, first, second):
    model, _ = dense(backbone)
    plan, once = sliced_by(backbone, first)
    later = plan_of(space_for(once, backbone.input_size), second)
    twice, direct = slice_model(once, later), slice_model(model, plan.then(later))
    assert count(twice) < count(once)
    assert twice.sidt_plan.sizes == plan.then(later).sizes == later.sizes
    assert all(
        torch.equal(a, b) for a, b in zip(twice.state_dict().values(), direct.state_dict().values(), strict=True)
    )
    assert same(run(twice, backbone.images()), run(direct, backbone.images()))


@pytest.mark.parametrize("which", [0, *EMPTY])
def test_saved_and_loaded_strictly_gives_the_same_output(backbone, which):
    plan, sliced = sliced_by(backbone, which)
    fresh = slice_model(backbone.build(seed=1), plan)
    assert not same(run(fresh, backbone.images()), run(sliced, backbone.images()))
    fresh.load_state_dict(load(save(sliced.state_dict())), strict=True)
    assert same(run(fresh, backbone.images()), run(sliced, backbone.images()))


@pytest.mark.parametrize("which", [0, "together"])
def test_export_gives_the_same_output(backbone, which):
    _, sliced = sliced_by(backbone, which)
    images = backbone.images(1)
    exported = torch.export.export(sliced, (images,)).module()
    assert_close(run(exported, images), run(sliced, images), **TOLERANCE)


def trained(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of one step in train mode."""
    model.train()
    pooled = [
        y if y.ndim == 2 else y.mean((2, 3)) for y in outputs_of(model(images))
    ]  # a distilled model has two heads
    sum(F.cross_entropy(y, torch.arange(len(y))) for y in pooled).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("which", [0, *EMPTY])
def test_it_trains(backbone, which):
    _, sliced = sliced_by(backbone, which)
    gradients = trained(
        slice_model(sliced, DimensionPlan(space_for(sliced, backbone.input_size), {})), backbone.images()
    )
    assert set(gradients) == {n for n, p in sliced.named_parameters() if p.requires_grad}
    none = {n for n, p in sliced.named_parameters() if not p.numel()}
    assert bool(none) == any(not size for size in sliced.sidt_plan.sizes.values())
    assert set(gradients) | none == set(trained(backbone.build(), backbone.images()))
    assert all(g.isfinite().all() for g in gradients.values())


@cache
def patterns(name: str) -> dict[str, re.Pattern[str]]:
    """The parameter lines of a family's file, as regular expressions made here."""
    (file,) = (family.file for family in families() if family.file.stem == name)

    def flat(tree, prefix=""):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]

    lines = flat(yaml.safe_load(file.read_text())["parameters"])
    return {line: re.compile(re.sub(r"\{\w\}", r"\\d+", line.replace(".", r"\."))) for line in lines}


def matching(family: str, name: str) -> list[str]:
    return [line for line, pattern in patterns(family).items() if pattern.fullmatch(name)]


def test_every_parameter_matches_one_line(backbone):
    model, space = dense(backbone)
    assert all(len(matching(space.family, name)) == 1 for name, _ in model.named_parameters())
    assert set(space.places) >= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", [f.file.stem for f in families()])
def test_every_line_is_exercised(family):
    spaces = [space for _, space in map(dense, BACKBONES) if space.family == family]
    used = {line for space in spaces for name in space.places for line in matching(family, name)}
    assert set(patterns(family)) == used


LARGE = {
    "vit_giant_patch14_dinov2",
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "eva_giant_patch14_224",
    "vit_huge_plus_patch16_dinov3",
}  # sizes only: up to 1.1 G


@pytest.mark.parametrize("backbone", {b.name: b for b in BACKBONES}.values(), ids=lambda b: b.name)
def test_real_size(backbone):
    device = "meta" if backbone.name in LARGE else "cpu"
    with torch.device(device):
        model = backbone.create(**{"num_classes": 1000} if backbone.source == "timm" else {})
    model.eval()
    space = space_for(model, None if backbone.source == "timm" else (3, 224, 224))
    plan = random_plan(space, 0)
    sliced = slice_model(model, plan)
    costs = PlanCosts(space)
    counted = measure(sliced, space.trace.input_size)
    assert costs.of(np.array([plan.sizes[n] for n in costs.names])).tolist() == [count(sliced), counted.macs]
    assert costs.dense.tolist() == [count(model), measure(model, space.trace.input_size).macs]
    outputs = run(sliced, torch.randn(1, *space.trace.input_size, device=device))
    widths = [1000] if backbone.source == "timm" else [plan.sizes[f"embed.{stage}"] for stage in range(4)]
    assert [y.shape[1] for y in outputs] == widths
