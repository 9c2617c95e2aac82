"""One suite for every search space: what must hold for any backbone and any plan."""

import re
from functools import cache

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from backbones import BACKBONES, Backbone, dense, random_plan
from safetensors.torch import load, save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sidt.complexity import PlanCosts, measure, report
from sidt.families import INNER_KINDS, KINDS, families
from sidt.plan import DimensionPlan
from sidt.space import space_for
from sidt.surgery import mask_model, slice_model

SEEDS = range(3)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=BACKBONES, ids=str)
def backbone(request):
    return request.param


@cache
def sliced_by(backbone: Backbone, seed: int, kinds=KINDS) -> tuple[DimensionPlan, nn.Module]:
    model, space = dense(backbone)
    plan = random_plan(space, seed, kinds)
    return plan, slice_model(model, plan)


@torch.no_grad()
def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def real_macs(model: nn.Module, images: torch.Tensor) -> int:
    """PyTorch's own counter on a real forward; the math backend shows attention as its two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model, images)
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
    assert torch.equal(run(full, backbone.images()), run(model, backbone.images()))
    assert predicted(backbone, DimensionPlan(space, {})) == [
        count(model),
        real_macs(model, backbone.images(1)),
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_is_sliced(backbone, seed):
    model, _ = dense(backbone)
    plan, sliced = sliced_by(backbone, seed, INNER_KINDS)
    images = backbone.images()
    masked = run(mask_model(model, plan), images)
    assert_close(run(sliced, images), masked, **TOLERANCE)
    assert (masked - run(model, images)).abs().max() > 1e-2 and count(sliced) < count(model)


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
        *copies, dimension = term  # PatchMerging's norm is over four copies of the width
        if plan.space.dimensions[dimension].kind == "width":
            size, keep = plan.space.sizes[dimension], plan.keep[dimension]
            kept = np.concatenate([keep + size * c for c in range(*copies or [1])])
            masked.set_submodule(name, KeptNorm(masked.get_submodule(name), torch.from_numpy(kept)))
    assert any(isinstance(m, KeptNorm) for m in masked.modules())
    return masked


@pytest.mark.parametrize("kinds", [("width",), KINDS], ids=["width", "all"])
@pytest.mark.parametrize("seed", SEEDS)
def test_width_sliced_is_norms_over_the_kept_units(backbone, seed, kinds):
    model, _ = dense(backbone)
    plan, sliced = sliced_by(backbone, seed, kinds)
    images = backbone.images()
    expected = run(with_kept_norms(model, plan), images)
    assert_close(run(sliced, images), expected, **TOLERANCE)
    assert (run(mask_model(model, plan), images) - expected).abs().max() > 1e-3  # the statistics matter
    assert count(sliced) < count(model)


@pytest.mark.parametrize("seed", SEEDS)
def test_predicted_is_counted(backbone, seed):
    plan, sliced = sliced_by(backbone, seed)
    assert predicted(backbone, plan) == [count(sliced), real_macs(sliced, backbone.images(1))]
    rows = {by: report(dense(backbone)[1], plan.sizes, by) for by in ("module", "block", "kind")}
    for by, table in rows.items():
        assert [table.params, table.macs] == predicted(backbone, plan), by
    assert len(rows["module"].rows) > len(rows["block"].rows) > 3
    assert "(other)" not in {row.name for row in rows["module"].rows}


def test_the_sliced_model_has_the_space_of_the_plan(backbone):
    for seed in SEEDS:
        plan, sliced = sliced_by(backbone, seed)
        assert space_for(sliced, backbone.input_size).sizes == plan.sizes


def test_slicing_twice_is_slicing_by_the_composed_plan(backbone):
    model, _ = dense(backbone)
    plan, once = sliced_by(backbone, 0)
    later = random_plan(space_for(once, backbone.input_size), 1)
    twice, direct = slice_model(once, later), slice_model(model, plan.then(later))
    assert count(twice) < count(once)
    assert twice.sidt_plan.sizes == plan.then(later).sizes == later.sizes
    assert all(
        torch.equal(a, b) for a, b in zip(twice.state_dict().values(), direct.state_dict().values(), strict=True)
    )
    assert torch.equal(run(twice, backbone.images()), run(direct, backbone.images()))


def test_saved_and_loaded_strictly_gives_the_same_output(backbone):
    plan, sliced = sliced_by(backbone, 0)
    fresh = slice_model(backbone.build(seed=1), plan)
    assert not torch.equal(run(fresh, backbone.images()), run(sliced, backbone.images()))
    fresh.load_state_dict(load(save(sliced.state_dict())), strict=True)
    assert torch.equal(run(fresh, backbone.images()), run(sliced, backbone.images()))


def test_export_gives_the_same_output(backbone):
    _, sliced = sliced_by(backbone, 0)
    images = backbone.images(1)
    exported = torch.export.export(sliced, (images,)).module()
    assert_close(run(exported, images), run(sliced, images), **TOLERANCE)


def trained(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of one step in train mode."""
    outputs = model.train()(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)  # a distilled model has two heads
    sum(F.cross_entropy(y, torch.arange(len(y))) for y in outputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_it_trains(backbone):
    _, sliced = sliced_by(backbone, 0)
    gradients = trained(
        slice_model(sliced, DimensionPlan(space_for(sliced, backbone.input_size), {})), backbone.images()
    )
    assert set(gradients) == {n for n, p in sliced.named_parameters() if p.requires_grad}
    assert set(gradients) == set(trained(backbone.build(), backbone.images()))
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


@pytest.mark.parametrize("family", [f.file.stem for f in families() if any("timm" in m for m in f.models)])
def test_every_line_is_exercised(family):
    spaces = [space for _, space in map(dense, BACKBONES) if space.family == family]
    used = {line for space in spaces for name in space.places for line in matching(family, name)}
    assert set(patterns(family)) == used


LARGE = {
    "vit_giant_patch14_dinov2",
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
}  # sizes only: up to 1.1 G


@pytest.mark.parametrize("name", dict.fromkeys(b.name for b in BACKBONES))
def test_real_size(name):
    device = "meta" if name in LARGE else "cpu"
    with torch.device(device):
        model = timm.create_model(name, num_classes=1000).eval()
    space = space_for(model)
    plan = random_plan(space, 0)
    sliced = slice_model(model, plan)
    costs = PlanCosts(space)
    counted = measure(sliced, space.trace.input_size)
    assert costs.of(np.array([plan.sizes[n] for n in costs.names])).tolist() == [count(sliced), counted.macs]
    assert costs.dense.tolist() == [count(model), measure(model).macs]
    assert run(sliced, torch.randn(1, *space.trace.input_size, device=device)).shape == (1, 1000)
