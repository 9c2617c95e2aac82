"""What runs on a GPU is what runs on a CPU. Skipped where torch sees no CUDA device."""

import copy

import numpy as np
import pytest
import torch
from backbones import BACKBONES, VIT_TINY, Backbone, dense, random_plan
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

import sidt
from sidt import importance
from sidt.allocation.timing import measure_layers
from sidt.importance.gates import GateConfig
from sidt.space.outputs import tensors_of
from sidt.sparsity.engines import semi_structured
from sidt.sparsity.holding import project
from sidt.sparsity.patterns import OfEvery
from sidt.sparsity.structures import Structure
from sidt.training.loop import TrainConfig, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
HERE = [b for b in BACKBONES if b.source != "transformers"]  # whose release on a machine with a GPU may be another


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions would run in TF32, whose mantissa has ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=HERE, ids=str)
def backbone(request):
    return request.param


def on_gpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cuda()


def batches(backbone: Backbone) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = backbone.images(8)
    return [(images[i : i + 4], torch.arange(i, i + 4)) for i in (0, 4)]


def loss(model: nn.Module, batch) -> torch.Tensor:
    images = batch[0].to(next(model.parameters()).device)
    return torch.stack([out.square().mean() for out in tensors_of(model(images))]).sum()


@torch.no_grad()
def close(model: nn.Module, other: nn.Module, images: torch.Tensor, tolerance: float = 1e-3) -> None:
    """The first, on the GPU, gives what the second gives on the CPU."""
    for ours, theirs in zip(tensors_of(model(images.cuda())), tensors_of(other(images)), strict=True):
        assert (ours.cpu() - theirs).norm() <= tolerance * theirs.norm()


def test_a_sliced_model_gives_the_same(backbone):
    model, space = dense(backbone)
    plan, images = random_plan(space, 0), backbone.images()
    close(sidt.slice_model(on_gpu(model), plan), sidt.slice_model(model, plan), images)


def test_scores_moments_alignment_and_repair_are_the_same(backbone):
    model, space = dense(backbone)
    twin, images = on_gpu(model), batches(backbone)
    moments = [sidt.measure_moments(m, images, space=space) for m in (twin, model)]
    scores = [importance.taylor(m, images, loss, space=space) for m in (twin, model)]
    for name, theirs in scores[1].scores.items():
        assert_close(scores[0].scores[name], theirs, rtol=2e-2, atol=2e-3 * float(np.abs(theirs).max()))
    aligned, turned = sidt.align(twin, moments[0])
    assert all(p.is_cuda for p in aligned.parameters())
    close(aligned, model, images[0][0])
    plan = sidt.allocate(scores[1], sidt.Budget(params=0.8))
    close(sidt.compensate(twin, plan, moments[0]), sidt.compensate(model, plan, moments[1]), images[0][0], 1e-2)
    plan = sidt.allocate(importance.random(aligned, space=turned.space), sidt.Budget(params=0.8))
    small = sidt.compensate(aligned, plan, turned)
    assert all(p.is_cuda for p in small.parameters())


def test_the_other_scores_are_the_same():
    model, space = dense(VIT_TINY)
    images = batches(VIT_TINY)
    for criterion in (importance.fisher, importance.activation, importance.magnitude):
        ours, theirs = (
            criterion(m, *(() if criterion is importance.magnitude else (images,)), space=space)
            for m in (on_gpu(model), model)
        )
        for name, expected in theirs.scores.items():
            assert_close(ours.scores[name], expected, rtol=1e-2, atol=1e-3 * float(np.abs(expected).max()))


def examples(backbone: Backbone, count: int = 64) -> TensorDataset:
    size = dense(backbone)[1].trace.input_size
    return TensorDataset(torch.randn(count, *size), torch.arange(count) % 10)


def test_gates_are_learned_alike():
    model, data = dense(VIT_TINY)[0], examples(VIT_TINY)
    found = [
        importance.learn_gates(m, data, GateConfig(epochs=1, batch_size=16, device=device)).importance
        for m, device in ((on_gpu(model), "cuda"), (model, "cpu"))
    ]
    for name, expected in found[1].scores.items():
        assert_close(found[0].scores[name], expected, rtol=1e-2, atol=1e-2 * float(np.abs(expected).max()))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_follows_the_cpu(precision, tmp_path):
    model, data = dense(VIT_TINY)[0], examples(VIT_TINY)
    options = {"epochs": 2, "batch_size": 16, "lr": 1e-3, "smoothing": 0.0}
    on_cpu = fit(copy.deepcopy(model), data, TrainConfig(device="cpu", **options))
    config = TrainConfig(device="cuda", precision=precision, **options)
    ours = fit(copy.deepcopy(model), data, config, folder=tmp_path)
    assert fit(copy.deepcopy(model), data, config, folder=tmp_path) == ours  # nothing is left to do
    tolerance = 1e-3 if precision == "no" else 5e-2
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in on_cpu], rel=tolerance)


def test_layers_are_timed_there():
    model, space = dense(VIT_TINY)
    model = on_gpu(model)
    table = measure_layers(model, space, batch=1, rounds=2)
    scores = importance.random(model, space=space)
    plan = sidt.allocate(scores, sidt.Budget(latency=0.9), latencies=table)
    assert 0 < table.milliseconds(plan.sizes) < table.milliseconds(space.sizes)


def test_two_of_four_by_its_kernels():
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 2}
    wide = Backbone("vit_tiny_patch16_224", options)
    model = copy.deepcopy(dense(wide)[0])
    names = [f"blocks.{i}.mlp.{layer}.weight" for i in range(2) for layer in ("fc1", "fc2")]
    structures = dict.fromkeys(names, Structure((OfEvery(2, 4),)))
    project(model, structures)
    images = wide.images(64)
    with torch.no_grad():
        ours, theirs = semi_structured(model, structures)(images), model(images)
    assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
