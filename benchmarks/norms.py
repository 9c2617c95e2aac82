"""Which norm a rotated width should end with: the time of a forward with LayerNorms, and with RMSNorms.

    OMP_NUM_THREADS=1 python benchmarks/norms.py

Behind a LayerNorm a width keeps one unit more for the mean; behind an RMSNorm (timm's, by norm_layer=) it would not.
"""

import statistics
from functools import partial
from pathlib import Path

import click
import timm
import torch
from results import environment, write_results
from timm.layers import RmsNorm
from torch import nn

from sidt.cost.complexity import time_forward
from sidt.report.tables import table

HERE = Path(__file__).parent
SMALL = {"img_size": 32, "patch_size": 4, "depth": 6, "num_heads": 6}
MODELS = (("deit_small_patch16_224", {}, (1, 8)), ("deit_tiny_patch16_224", SMALL, (1, 32)))
NORMS = {"LayerNorm": partial(nn.LayerNorm, eps=1e-6), "RMSNorm": RmsNorm}


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--out", default=str(HERE / "results" / "norms"), type=click.Path(path_type=Path))
def main(rounds: int, out: Path) -> None:
    """Time both in turn, then write the results."""
    where, rows, data = environment(), [], []
    torch.manual_seed(0)
    for name, args, batches in MODELS:
        models = {norm: timm.create_model(name, norm_layer=layer, **args).eval() for norm, layer in NORMS.items()}
        size = (3, args.get("img_size", 224), args.get("img_size", 224))
        for batch in batches:
            seen: dict[str, list[float]] = {norm: [] for norm in models}
            for _ in range(rounds):
                for norm, model in models.items():
                    seen[norm].append(time_forward(model, size, batch=batch, seconds=0.2))
            ratios = [r / layer for r, layer in zip(seen["RMSNorm"], seen["LayerNorm"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            medians = {norm: statistics.median(times) for norm, times in seen.items()}
            cells = [f"{medians[norm]:.2f}" for norm in NORMS]
            rows.append([f"{name} {args or ''}".strip(), str(batch), *cells, f"{middle:.3f} ({low:.3f} to {high:.3f})"])
            data.append({"model": name, "args": args, "batch": batch, "ms": seen})
    headers = ["model", "batch", "LayerNorm, ms", "RMSNorm, ms", "RMSNorm / LayerNorm (quartiles)"]
    text = f"Medians of {rounds} rounds, both models in turn; random weights.\n\n{table(headers, rows, 'md')}"
    write_results(out, "LayerNorm and RMSNorm", where, text, data)
    click.echo(text)


if __name__ == "__main__":
    main()
