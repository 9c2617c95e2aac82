"""Engines compute what the model computes; a packed checkpoint gives the same model back."""

import copy

import numpy as np
import pytest
import torch
from backbones import Backbone, dense, random_plan
from torch.testing import assert_close

import sidt
from sidt.sparsity.engines import block_sparse, semi_structured
from sidt.sparsity.holding import project
from sidt.sparsity.patterns import Largest, OfEvery
from sidt.sparsity.structures import Structure
from sidt.sparsity.tiles import Tiles
from sidt.sparsity.values import Levels

VIT = Backbone("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2})
TILES = Structure((Largest(Tiles(4, 4), 0.5),))
LAYERS = [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture
def tiled():
    """A model with zero tiles, and its structures."""
    model, structures = copy.deepcopy(dense(VIT)[0]), dict.fromkeys(LAYERS, TILES)
    project(model, structures)
    return model, structures


def test_skipping_tiles_is_multiplying_by_zeros(tiled):
    model, structures = tiled
    twin, images = block_sparse(model, structures), VIT.images()
    kept = [
        module.weight.values().shape[0] for module in twin.modules() if type(module).__name__ == "BlockSparseLinear"
    ]
    assert sum(kept) * 4 * 4 == sum(int(model.get_parameter(n).numel()) for n in LAYERS) // 2  # the rest is not there
    with torch.inference_mode():
        assert_close(twin(images), model(images), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, TILES.project(model.blocks[0].mlp.fc1.weight))


def test_a_sliced_attention_skips_tiles_too():
    model, space = dense(VIT)
    keep = {f"qk.{i}": np.stack([np.arange(8)] * 2) for i in range(2)}  # of 12, so that q/k and v differ
    model = sidt.slice_model(model, sidt.DimensionPlan(space, keep))
    structures = dict.fromkeys(LAYERS, TILES)
    project(model, structures)
    with torch.inference_mode():
        assert_close(block_sparse(model, structures)(VIT.images()), model(VIT.images()), atol=1e-5, rtol=1e-5)


def test_engines_that_have_nothing_to_do(tiled, refused):
    model, _ = tiled
    with refused("block-sparse", "engine"):
        block_sparse(model, {LAYERS[0]: Structure((), Levels(8))})
    with refused(LAYERS[0], "4 x 8", "square"):
        block_sparse(model, {LAYERS[0]: Structure((Largest(Tiles(4, 8), 0.5),))})
    if not torch.cuda.is_available():
        with refused("CUDA", "engine"):
            semi_structured(model, {LAYERS[0]: Structure((OfEvery(2, 4),))})


def test_a_packed_checkpoint_is_the_model(tiled, tmp_path, refused):
    model, structures = tiled
    args = {**VIT.kwargs, "num_classes": 10}
    sidt.save(model, tmp_path / "a", name=VIT.name, args=args)
    sidt.save(model, tmp_path / "a", name=VIT.name, args=args, structures=structures)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "packed.safetensors", "plan.json"]
    again = sidt.load(tmp_path / "a")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    sliced = sidt.slice_model(model, random_plan(sidt.space_for(model), 0))
    sidt.save(sliced, tmp_path / "b", name=VIT.name, args=args)
    assert sidt.load(tmp_path / "b").blocks[0].mlp.fc1.weight.shape == sliced.blocks[0].mlp.fc1.weight.shape
    (tmp_path / "a" / "packed.safetensors").rename(tmp_path / "b" / "packed.safetensors")
    with refused(tmp_path / "b" / "packed.safetensors", "not this model's"):
        sidt.load(tmp_path / "b")
    with refused("blocks.0.attn.qkv.weight", "project"):
        sidt.save(model, tmp_path / "c", name=VIT.name, args=args, structures={LAYERS[0]: Structure((), Levels(8))})
    assert not (tmp_path / "c" / "config.json").exists()
