"""One suite for every search space: what must hold for any backbone and any plan."""

import copy
import re
from functools import cache, lru_cache
from importlib.util import find_spec

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
from sidt.space.outputs import tensors_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for
from sidt.surgery.slicing import mask_model, slice_model

SEEDS = range(3)
EMPTY = ("apart", "together")  # sublayers that lose all their units
PLANS = (*SEEDS, *EMPTY)
WHOLE_V = re.compile("dlittle|dpwee|mvitv2")  # a norm over each head's v keeps it whole
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def tolerance(backbone: Backbone) -> dict[str, float]:
    """Mask2Former's masks are sums of 32 products of features, of many times the size of logits."""
    return TOLERANCE | ({"atol": 1e-4} if backbone.name.startswith("Mask2Former") else {})


@pytest.fixture(scope="module", params=BACKBONES, ids=str)
def backbone(request):
    return request.param


def plan_of(space: DimensionSpace, which: int | str, kinds=KINDS) -> DimensionPlan:
    """The plan of a seed, or one that also empties sublayers."""
    return random_plan(space, 0, kinds, sublayers(space, which)) if which in EMPTY else random_plan(space, which, kinds)


@lru_cache(maxsize=16)  # those of one backbone
def sliced_by(backbone: Backbone, which: int | str, kinds=KINDS) -> tuple[DimensionPlan, nn.Module]:
    model, space = dense(backbone)
    plan = plan_of(space, which, kinds)
    return plan, slice_model(model, plan)


@torch.no_grad()
def run(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a model gives: logits, or a map for each stage."""
    return outputs_of(model(images))


def outputs_of(result) -> tuple[torch.Tensor, ...]:
    return tuple(tensors_of(result))


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
        no_width = space.family in ("maxxvit", "pit") or backbone.label == "resnet"
        whole = {"width"} if no_width else {"v"} if WHOLE_V.search(str(backbone)) else set()
        assert {d.kind for d in free} >= {"width", "heads", "v", "mlp"} - whole
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
    """The other tests of such plans stand on this: heads, MLP or both are gone."""
    _, space = dense(backbone)
    for which in EMPTY:
        plan = plan_of(space, which)
        gone = {name for name, size in plan.sizes.items() if not size}
        assert gone == sublayers(space, which)
        assert {space.dimensions[name].kind for name in gone} == {"heads", "mlp"}
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
    assert_close(run(sliced, images), masked, **tolerance(backbone))
    assert gap(masked, run(model, images)) > 1e-2 and count(sliced) < count(model)


class KeptNorm(nn.Module):
    """A norm whose statistics see only some of the positions; the others come out as zero."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.norm).__name__ == "LayerNorm2d":
            return self.over_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.over_last(x)

    def over_last(self, x: torch.Tensor) -> torch.Tensor:
        seen, size = x[..., self.kept], (len(self.kept),)
        weight = None if self.norm.weight is None else self.norm.weight[self.kept]
        if isinstance(self.norm, nn.LayerNorm):
            bias = None if self.norm.bias is None else self.norm.bias[self.kept]
            seen = F.layer_norm(seen, size, weight, bias, self.norm.eps)
        else:
            seen = F.rms_norm(seen, size, weight, self.norm.eps)
        out = torch.zeros_like(x)
        out[..., self.kept] = seen
        return out


def with_kept_norms(model: nn.Module, plan: DimensionPlan) -> nn.Module:
    """The dense model with the dropped width zeroed, and each norm over a width looking at the kept units."""
    masked = mask_model(model, plan)
    kinds = ("RmsNorm", "RmsNormFp32")
    norms = [n for n, m in masked.named_modules() if isinstance(m, nn.LayerNorm) or type(m).__name__ in kinds]
    for name in norms:
        place = plan.space.places.get(f"{name}.weight")  # without one, its size is an attribute
        (term,) = plan.space.attributes[f"{name}.normalized_shape.0"] if place is None else place.axes[0]
        dimension = next((symbol for symbol in term if isinstance(symbol, str)), None)
        if dimension is not None and plan.space.dimensions[dimension].kind == "width":
            # PatchMerging's norm is over four pixels: timm has the channels of a pixel side by side, and
            # MMDetection the pixels of a channel.
            size, keep = plan.space.sizes[dimension], plan.keep[dimension]
            pixels = np.arange(next((symbol for symbol in term if isinstance(symbol, int)), 1))
            kept = pixels[:, None] * size + keep if term[-1] == dimension else keep[:, None] * len(pixels) + pixels
            masked.set_submodule(name, KeptNorm(masked.get_submodule(name), torch.from_numpy(kept.ravel())))
    assert any(isinstance(m, KeptNorm) for m in masked.modules())
    return masked


def of(name: str, plan: DimensionPlan) -> tuple[int, int]:
    """The sizes of a dimension before and after."""
    return plan.space.sizes[name], plan.sizes[name]


def kept_channels(
    outputs: tuple[torch.Tensor, ...], smaller: tuple[torch.Tensor, ...], plan: DimensionPlan
) -> tuple[torch.Tensor, ...]:
    """Of tokens, and of a map of each stage, the channels that the plan keeps; logits as they are."""
    found = []
    for y, small in zip(outputs, smaller, strict=True):
        for axis in (d for d in range(y.ndim) if y.shape[d] != small.shape[d]):
            sizes = (y.shape[axis], small.shape[axis])
            (width,) = (
                d.name for d in plan.space.dimensions.values() if d.kind == "width" and of(d.name, plan) == sizes
            )
            y = y.index_select(axis, torch.as_tensor(plan.keep[width]))
        found.append(y)
    return tuple(found)


@pytest.mark.parametrize("kinds", [("width",), KINDS], ids=["width", "all"])
@pytest.mark.parametrize("which", PLANS)
def test_width_sliced_is_norms_over_the_kept_units(backbone, which, kinds):
    model, space = dense(backbone)
    if not any(d.kind == "width" for d in space.dimensions.values()):
        pytest.skip(f"the file {space.family} searches no width")
    plan, sliced = sliced_by(backbone, which, kinds)
    images = backbone.images()
    seen = run(sliced, images)
    expected = kept_channels(run(with_kept_norms(model, plan), images), seen, plan)
    assert_close(seen, expected, **tolerance(backbone))
    masked = kept_channels(run(mask_model(model, plan), images), seen, plan)
    assert gap(masked, expected) > (3e-4 if backbone.name.startswith("Detr") else 1e-3)  # the statistics matter
    assert count(sliced) < count(model)


@pytest.mark.parametrize("which", PLANS)
def test_predicted_is_counted(backbone, which):
    plan, sliced = sliced_by(backbone, which)
    assert predicted(backbone, plan) == [count(sliced), real_macs(sliced, backbone.images(1))]
    rows = {by: report(dense(backbone)[1], plan.sizes, by) for by in ("module", "block", "kind")}
    for by, table in rows.items():
        assert [table.params, table.macs] == predicted(backbone, plan), by
    assert len(rows["module"].rows) > len(rows["block"].rows) > 3
    # What attentions that stay whole multiply: outlook attention, and those of Mask2Former's decoders.
    whole = backbone.name.startswith(("volo", "Mask2Former"))
    assert ("(other)" in {row.name for row in rows["module"].rows}) == whole
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


@pytest.mark.parametrize("which", [0, pytest.param("together", marks=pytest.mark.slow)])
def test_export_gives_the_same_output(backbone, which):
    _, sliced = sliced_by(backbone, which)
    images = backbone.images(1)
    exported = torch.export.export(sliced, (images,)).module()
    assert_close(run(exported, images), run(sliced, images), **tolerance(backbone))


def trained(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of one step in train mode."""
    model.train()
    pooled = [
        y if y.ndim == 2 else y.mean(1) if y.ndim == 3 else y.mean((2, 3)) for y in outputs_of(model(images))
    ]  # a distilled model has two heads
    sum(F.cross_entropy(y, torch.arange(len(y))) for y in pooled).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("which", [0, *EMPTY])
def test_it_trains(backbone, which):
    _, sliced = sliced_by(backbone, which)
    gradients = trained(
        slice_model(sliced, DimensionPlan(space_for(sliced, backbone.input_size), {})), backbone.images()
    )
    learning = {n for n, p in sliced.named_parameters() if p.requires_grad}
    unused = ["mask_token"]  # for images with parts left out
    if any("hidden_states_norms" in name for name in learning):  # of maps; there is another of the last, for no one
        unused += ["swin.layernorm.weight", "swin.layernorm.bias"]
    assert set(gradients) == {n for n in learning if not n.endswith(tuple(unused))}
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


def whole_in(family: str) -> re.Pattern[str]:
    """How the names begin of what a family never searches."""
    (file,) = (f.file for f in families() if f.file.stem == family)
    modules = yaml.safe_load(file.read_text()).get("whole", ())
    return re.compile("|".join(re.sub(r"\{\w\}", r"\\d+", f"{m}.".replace(".", r"\.")) for m in modules) or "$.")


def test_every_parameter_matches_one_line(backbone):
    model, space = dense(backbone)
    whole = whole_in(space.family)
    for name, _ in model.named_parameters():
        assert len(matching(space.family, name)) == 1 or (not matching(space.family, name) and whole.match(name))
    assert set(space.places) >= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", families(), ids=lambda family: family.file.stem)
def test_what_a_family_lists_is_searched_in_some_model(family):
    if family.file.stem.startswith("transformers") and find_spec("transformers") is None:
        pytest.skip("the extra transformers is not installed; it needs Python 3.11")
    spaces = [space for _, space in map(dense, BACKBONES) if space.family == family.file.stem]
    searched = {d.kind for space in spaces for d in space.dimensions.values() if not d.fixed}
    assert set(family.kinds) == searched


@pytest.mark.parametrize("family", [f.file.stem for f in families()])
def test_every_line_is_exercised(family):
    if family.startswith("transformers") and find_spec("transformers") is None:
        pytest.skip("the extra transformers is not installed; it needs Python 3.11")
    spaces = [space for _, space in map(dense, BACKBONES) if space.family == family]
    used = {line for space in spaces for name in space.places for line in matching(family, name)}
    if missing := set(patterns(family)) - used:  # lines of buffers that only sliced models have
        sliced = [sliced_by(b, 0)[1] for b in BACKBONES if dense(b)[1].family == family]
        buffers = {line for model in sliced for name, _ in model.named_buffers() for line in matching(family, name)}
        assert missing <= buffers
    assert set(patterns(family)) >= used


LARGE = {
    "vit_giant_patch14_dinov2",
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "eva_giant_patch14_224",
    "vit_huge_plus_patch16_dinov3",
    "deepseek_vit_412m",
    "deepseek_vit_412m_align",
    "deepseek_vit_412m_enc",
}  # sizes only: up to 1.1 G


WHOLE_MODELS = ("DetrForObjectDetection", "Mask2FormerForUniversalSegmentation")  # of a backbone that is told by name


@pytest.mark.parametrize(
    "backbone", {b.name: b for b in BACKBONES if b.name not in WHOLE_MODELS}.values(), ids=lambda b: b.name
)
def test_real_size(backbone):
    device = "meta" if backbone.name in LARGE or backbone.source == "transformers" else "cpu"
    with torch.device(device):
        model = backbone.create(**backbone.classes(1000))
    model.eval()
    space = space_for(model, (3, 224, 224) if backbone.source in ("mmdet", "vitdet") else None)
    plan = random_plan(space, 0)
    sliced = slice_model(model, plan)
    costs = PlanCosts(space)
    counted = measure(sliced, space.trace.input_size)
    assert costs.of(np.array([plan.sizes[n] for n in costs.names])).tolist() == [count(sliced), counted.macs]
    assert costs.dense.tolist() == [count(model), measure(model, space.trace.input_size).macs]
    outputs = run(sliced, torch.randn(1, *space.trace.input_size, device=device))
    if backbone.source == "mmdet":
        assert [y.shape[1] for y in outputs] == [plan.sizes[f"embed.{stage}"] for stage in range(4)]
    elif backbone.classes(1000) and not backbone.name.endswith("_enc"):  # which has no head
        assert {y.shape[1] for y in outputs} == {1000}
