"""A home-made transformer: its search space as a file, and its attention for any sizes.

The block splits q, k and v in equal parts, which is wrong once v is larger than q and k. ``FORWARDS`` says how it is
done for any sizes; the space names the module that has it, which is this one.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import sidt
from sidt.data import DataConfig, load_data
from sidt.surgery.attention import Forward, attend, split_qkv
from sidt.training import make_loader, top1

SPACE = """
models: [own_space.Net]
forwards: own_space
axes:
  embed: width
  heads.{i}: heads
  qk.{i}: qk per heads
  v.{i}: v per heads
  hidden.{i}: mlp
parameters:
  patch.weight: embed, _, _, _
  patch.bias: embed
  blocks.{i}:
    norm1.weight: embed
    norm1.bias: embed
    qkv.weight: heads qk + heads qk + heads v, embed
    qkv.bias: heads qk + heads qk + heads v
    out.weight: embed, heads v
    out.bias: embed
    norm2.weight: embed
    norm2.bias: embed
    wide.weight: hidden, embed
    wide.bias: hidden
    narrow.weight: embed, hidden
    narrow.bias: embed
  norm.weight: embed
  norm.bias: embed
  head.weight: _, embed
  head.bias: _
norms:
  blocks.{i}.norm1: blocks.{i}.qkv
  blocks.{i}.norm2: blocks.{i}.wide
  norm: head
attributes:
  blocks.{i}.heads: heads
"""


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.scale = heads, (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.narrow(self.wide(self.norm2(x)).relu())


class SlicedBlock(Block):
    """The same for any head count, q/k size and v size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if self.heads:
            q, k, v = split_qkv(self.qkv(self.norm1(x)), self.heads, self.out.in_features)
            x = x + self.out(attend(q, k, v, self.scale).transpose(1, 2).flatten(2))
        else:
            x = x + self.out(x[..., :0])
        return x + self.narrow(self.wide(self.norm2(x)).relu())


FORWARDS = {Block: Forward(SlicedBlock, takes=lambda module, heads, qk, v: False)}


class Net(nn.Module):
    """A ViT without a class token."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 10]."""
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


def main(epochs: int) -> None:
    """Train, then shrink by the file."""
    torch.manual_seed(0)
    data = load_data(DataConfig(name="digits", image_size=16))
    model = Net()
    sidt.finetune(model, data.train, epochs=epochs, batch_size=32, lr=2e-3)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "my_space.yaml"
        file.write_text(SPACE, encoding="utf-8")
        sidt.use_spaces(file)
        small = sidt.shrink(model, make_loader(data.calibration, 64), sidt.Budget(params=0.3))
    print(small)
    print(small.plan.sizes)
    print(f"{top1(model, data.test):.1%} dense, {top1(small.model, data.test):.1%} sliced and repaired")


if __name__ == "__main__":
    from own_space import main as by_name  # so that classes are those of the module that the space names

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    by_name(**vars(parser.parse_args()))
