"""Network Purification: what is nearly empty and matters little is made empty, and then leaves exactly."""

import copy

import numpy as np
import torch
from backbones import SWIN, VIT_TINY, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sidt import importance
from sidt.sparsity import purify, remove_unused
from sidt.sparsity.purification import emptiness


def sparse(backbone, share, seed=0):
    """A model of its own in which a share of all weights is zero, another share for every row."""
    model, space = dense(backbone)
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim > 1):
            shares = share * torch.rand(weight.shape[0], generator=generator)
            weight[torch.rand(weight.shape, generator=generator) < shares.view(-1, *[1] * (weight.ndim - 1))] = 0
    return model, space


def test_emptiness_is_the_share_of_zeros_in_all_places_of_a_unit():
    model, space = sparse(VIT_TINY, 1.0)
    found = emptiness(model, space)
    mlp, attn = model.blocks[1].mlp, model.blocks[1].attn
    entries = torch.cat([mlp.fc1.weight[5], mlp.fc2.weight[:, 5]])
    assert_close(found["hidden.1"][5], (entries == 0).double().mean())
    q, k, v = attn.qkv.weight.view(3, 3, 64, 192).unbind(0)
    both = torch.cat([q[2, 7], k[2, 7]])
    assert_close(found["qk.1"][2, 7], (both == 0).double().mean())
    head = torch.cat([q[2].flatten(), k[2].flatten(), v[2].flatten(), attn.proj.weight[:, 128:].flatten()])
    assert_close(found["heads.1"][2], (head == 0).double().mean())


@settings(max_examples=5)
@given(seed=st.integers(0, 99), eta=st.floats(0.1, 0.6), quantile=st.floats(0.2, 0.9))
def test_it_clears_those_that_are_empty_and_unimportant_and_no_others(seed, eta, quantile):
    model, space = sparse(SWIN, 1.0, seed)
    scores = importance.magnitude(model, space=space).scores
    sigma = float(np.quantile(scores["hidden.1.0"], quantile))
    pure, empty = purify(model, space, scores, eta, sigma), emptiness(model, space)
    mlp = pure.layers[1].blocks[0].mlp
    goes = (empty["hidden.1.0"] > eta) & torch.from_numpy(scores["hidden.1.0"] < sigma)
    assert torch.equal(mlp.fc1.bias == 0, goes)  # no bias was zero
    assert torch.equal(~mlp.fc1.weight.any(1) & ~mlp.fc2.weight.any(0), goes)
    kept = model.layers[1].blocks[0].mlp
    assert torch.equal(mlp.fc1.weight[~goes], kept.fc1.weight[~goes])
    assert torch.equal(pure.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_what_it_clears_leaves_exactly_and_the_clearing_is_lossy():
    model, space = sparse(VIT_TINY, 1.0)
    scores = importance.magnitude(model, space=space).scores
    pure = purify(model, space, scores, 0.5, float(np.median(scores["hidden.0"])))
    smaller = remove_unused(pure, space)
    images = VIT_TINY.images()
    with torch.no_grad():
        before, cleared, after = (m(images) for m in (model, pure, smaller))
    assert_close(after, cleared, rtol=0, atol=1e-6 * float(cleared.abs().max()))
    assert (cleared - before).abs().max() > 1e-3
    goes = (emptiness(model, space)["hidden.0"] > 0.5) & torch.from_numpy(
        scores["hidden.0"] < np.median(scores["hidden.0"])
    )
    assert smaller.sidt_plan.sizes["hidden.0"] == space.sizes["hidden.0"] - int(goes.sum()) < space.sizes["hidden.0"]


def test_nothing_empty_or_nothing_unimportant_changes_nothing():
    model, space = sparse(VIT_TINY, 0.5)
    scores = importance.magnitude(model, space=space).scores
    for eta, sigma in ((1.0, float("inf")), (0.0, -1.0)):
        same = purify(model, space, scores, eta, sigma)
        assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))


def test_what_cannot_be_used_is_refused(refused):
    model, space = dense(VIT_TINY)
    scores = importance.magnitude(model, space=space).scores
    with refused("eta", "1.5", "from 0 to 1"):
        purify(model, space, scores, 1.5, 0.0)
    with refused("sigma", "not a number"):
        purify(model, space, scores, 0.5, float("nan"))
    with refused("scores of hidden.0"):
        purify(model, space, {**scores, "hidden.0": scores["hidden.0"][:5]}, 0.5, 0.0)
