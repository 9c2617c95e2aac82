"""Where torch's block-sparse products beat dense ones: one linear layer, by its size, its tiles and what is kept.

    python benchmarks/block_sparse.py

Layers are those of MLPs (fc1) of DeiT-Ti, DeiT-S and ViT-B on the 197 tokens of an image; tiles that are kept are drawn
at random. Medians in turn, on one thread.
"""

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from results import environment, write_results
from torch import nn

from sidt.cost.clock import time_in_turn
from sidt.report.tables import table
from sidt.sparsity.engines import BlockSparseLinear
from sidt.sparsity.tiles import Tiles

HERE = Path(__file__).parent
LAYERS = {"DeiT-Ti": (192, 768), "DeiT-S": (384, 1536), "ViT-B": (768, 3072)}
KEPT = (0.5, 0.3, 0.1)


@click.command()
@click.option("--tokens", default=197, show_default=True)
@click.option("--out", default=HERE / "results" / "block_sparse", type=click.Path(path_type=Path))
def main(tokens: int, out: Path) -> None:
    """Time all of them, then write the results."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where, rows = environment(), list[list[Any]]()
    for name, (inputs, outputs) in LAYERS.items():
        x = torch.randn(tokens, inputs)
        for size in (8, 16, 32, 64):
            cells = []
            for kept in KEPT:
                layer = nn.Linear(inputs, outputs)
                drawn = torch.rand(outputs // size, inputs // size) < kept
                with torch.no_grad():
                    layer.weight.mul_(Tiles(size, size).spread(drawn, layer.weight))
                sparse = BlockSparseLinear(layer, size, size)
                with torch.inference_mode():
                    found = time_in_turn({"dense": partial(layer, x), "sparse": partial(sparse, x)})
                cells.append(f"{found['dense'] / found['sparse']:.2f}")
            rows.append([f"{name}, {inputs} x {outputs}", f"{size} x {size}", *cells])
            click.echo("  ".join(rows[-1]), err=True)
    headers = ["layer", "tiles", *(f"{kept:.0%} kept" for kept in KEPT)]
    text = f"Dense milliseconds by block-sparse ones, {tokens} tokens, one thread; above 1 the tiles win.\n\n"
    write_results(out, "Block-sparse products", where, text + table(headers, rows, "md"), rows)


if __name__ == "__main__":
    main()
