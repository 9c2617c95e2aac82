"""Drafted search spaces: those of known backbones bind what the hand-written files bind, and mistakes are said."""

import sys

import pytest
import torch
from backbones import DISTILLED, PVT, SWIN, VIT_TINY, dense
from torch import nn

from sidt.errors import InputError
from sidt.runs.drafting import draft_file, drafted_for
from sidt.space.axes import Present

HOME_MADE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.wide, self.narrow = nn.Linear(24, 80), nn.Linear(40, 24)
        self.heads = 3

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(((q @ k.mT) / 8).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        a, g = self.wide(self.norm2(x)).chunk(2, dim=-1)
        return x + self.narrow(a * g.sigmoid())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def small():
    return Net()


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, x):
        hidden = self.fc1(x.flatten(1)).relu()
        return self.fc2(hidden) + (1.0 if hidden.shape[1] == 6 else 2.0)


def fixed():
    return Fixed()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.fc2(self.fc1(x.flatten(1)).cumprod(1)) * self.scale


def scaled():
    return Odd()
"""


@pytest.fixture
def home_made(tmp_path, monkeypatch):
    """A module of one's own where it is found."""
    (tmp_path / "drafted_net.py").write_text(HOME_MADE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("drafted_net", None)


def _axes(space):
    """The places without ``name?``, which says what goes with the last head."""
    return {
        name: [[[s for s in term if not isinstance(s, Present)] for term in axis] for axis in place.axes]
        for name, place in space.places.items()
    }


def _dimensions(space):
    return {n: (d.kind, d.size, d.per, d.index) for n, d in space.dimensions.items()}


@pytest.mark.parametrize("backbone", [VIT_TINY, DISTILLED, SWIN], ids=str)
def test_a_draft_binds_what_the_file_binds(backbone, tmp_path):
    model, space = dense(backbone)
    drafted = drafted_for(model, tmp_path / "mine.yaml", space.trace.input_size)
    assert drafted.space is not None and not drafted.why
    assert _dimensions(drafted.space) == _dimensions(space)
    assert _axes(drafted.space) == _axes(space)
    assert drafted.space.attention == space.attention


def test_pvt(tmp_path):
    """The spatial reduction gives units of its own, under a norm: the draft leaves them whole."""
    model, space = dense(PVT)
    drafted = drafted_for(model, tmp_path / "mine.yaml", space.trace.input_size)
    assert _dimensions(drafted.space) == _dimensions(space)
    assert any("attn.norm" in line for line in drafted.draft.look)


def test_a_home_made_module(home_made, tmp_path):
    file = tmp_path / "mine.yaml"
    says = draft_file("drafted_net:small", file, (3, 8, 8))
    text = file.read_text()
    assert "qkv.weight: heads! qk! + heads! qk! + heads! v!, embed" in text
    assert "wide.weight: hidden + hidden, embed" in text and "    heads: heads!" in text
    assert "no attention forward takes pruned sizes for drafted_net.Block" in says and "# Look at: no attention" in text
    with pytest.raises(InputError, match="already there"):
        draft_file("drafted_net:small", file, (3, 8, 8))


def test_a_wrong_draft_says_so(home_made, tmp_path):
    """Half of the units gone, the module computes another thing, which no forward shows."""
    file = tmp_path / "mine.yaml"
    with pytest.raises(InputError, match="did not pass"):
        draft_file("drafted_net:fixed", file, (3, 2, 2))
    assert file.read_text().startswith("# A draft that DID NOT PASS its check: ")


def test_what_cannot_be_drafted(home_made, tmp_path):
    with pytest.raises(InputError, match="scale has no axes"):
        draft_file("drafted_net:scaled", tmp_path / "mine.yaml", (3, 2, 2))
    with pytest.raises(InputError, match="nowhere"):
        draft_file("drafted_net:small", tmp_path / "nowhere" / "mine.yaml", (3, 8, 8))
    with pytest.raises(InputError, match="cannot be exported"):
        drafted_for(_Branching(), tmp_path / "mine.yaml", (3, 2, 2))


class _Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        y = self.fc(x.flatten(1))
        return y if float(y.sum()) > 0 else -y


def test_unknown_operations_freeze(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(12, 6), nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc3(self.fc2(torch.cumprod(self.fc1(x.flatten(1)), 1)).relu())

    drafted = drafted_for(Net(), tmp_path / "mine.yaml", (3, 2, 2))
    assert any("cumprod in the model: no rule is for this operation" in line for line in drafted.draft.look)
    assert [d.size for d in drafted.space.dimensions.values()] == [8]
