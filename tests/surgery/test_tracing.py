"""Sliced models go wherever timm's dense ones go: TorchScript, and torch.fx with torchvision's feature extractor."""

import pytest
import torch
from backbones import PVT, SWIN, SWIN_V2, TIMM_BACKBONES, VIT_TINY, dense, random_plan, sublayers
from torch import nn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from sidt.surgery.slicing import slice_model

OTHERS = [b for b in TIMM_BACKBONES if b not in (VIT_TINY, SWIN, SWIN_V2, PVT)]
# As timm has them: torch.fx follows no decision by sizes, and TorchScript compiles not all of Python.
NOT_TRACED = ("vit_tiny_r_s16", "crossvit", "naflexvit", "samvit", "hiera_", "qwen3_vit")
NOT_SCRIPTED = ("naflexvit", "hiera_")
ALL = [VIT_TINY, SWIN, SWIN_V2, PVT, *(pytest.param(b, marks=pytest.mark.slow) for b in OTHERS)]


def extractor(model: nn.Module) -> nn.Module:
    """The model as torchvision traces it, with its last layer as output."""
    last = get_graph_node_names(model)[1][-1]
    return Only(create_feature_extractor(model, {last: "out"}))


class Only(nn.Module):
    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, images):
        return self.traced(images)["out"]


@pytest.mark.parametrize("empty", ["", "apart"], ids=["", "without-heads"])
@pytest.mark.parametrize("backbone", ALL, ids=str)
def test_sliced_models_are_scripted_and_traced(backbone, empty):
    """q/k and v sizes differ everywhere; batches of another size than the first give the same too."""
    model, space = dense(backbone)
    small = slice_model(model, random_plan(space, 0, empty=sublayers(space, empty) if empty else ()))
    changed = [m for m in small.modules() if type(m).__module__.startswith("sidt.surgery.")]
    assert len(changed) >= len(space.attention)
    with torch.no_grad():
        scripted = () if backbone.name.startswith(NOT_SCRIPTED) else (torch.jit.script,)
        traced = () if backbone.name.startswith(NOT_TRACED) else (extractor, torch.fx.symbolic_trace)
        for attention in () if scripted else changed:
            torch.jit.script(attention)
        for make in (*scripted, *traced):
            made = make(small)
            for batch in (2, 1, 3):
                images = backbone.images(batch)
                assert_close(made(images), small(images), rtol=1e-5, atol=1e-5)


def test_a_scripted_model_trains_and_is_saved(tmp_path):
    model, space = dense(VIT_TINY)
    small = slice_model(model, random_plan(space, 0))
    torch.jit.script(small).save(tmp_path / "small.pt")
    again = torch.jit.load(tmp_path / "small.pt")
    images = VIT_TINY.images()
    assert_close(again(images), small(images), rtol=1e-5, atol=1e-5)
    for each in (small, again):
        each.zero_grad()
        each(images).square().mean().backward()
    for (name, ours), (_, theirs) in zip(small.named_parameters(), again.named_parameters(), strict=True):
        assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-5, msg=name)
