"""2:4 on a GPU: torch's semi-structured kernels beside the dense half-precision model, timed in turn.

    python benchmarks/two_of_four.py [--models vit_base_patch16_224] [--batches 64,256]

Weights are random, and all MLPs and attention projections are 2:4: time depends on sizes alone.
"""

import statistics
from pathlib import Path

import click
import timm
import torch
from results import environment, write_results
from torch import Tensor, nn

from sidt.report.tables import table
from sidt.sparsity.engines import OnGpu, semi_structured
from sidt.sparsity.holding import project
from sidt.sparsity.patterns import OfEvery
from sidt.sparsity.structures import Structure

HERE = Path(__file__).parent
LAYERS = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


@torch.inference_mode()
def milliseconds(model: nn.Module, images: Tensor) -> float:
    """One forward, on the GPU alone, by events."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    model(images)
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


@click.command()
@click.option("--models", default="vit_base_patch16_224,vit_large_patch16_224", show_default=True)
@click.option("--batches", default="64,256", show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--out", default=str(HERE / "results" / "two_of_four"), type=click.Path(path_type=Path))
def main(models: str, batches: str, rounds: int, out: Path) -> None:
    """Time both, then write the results."""
    torch.manual_seed(0)
    rows = []
    for name in models.split(","):
        model = timm.create_model(name).eval()
        structures = {n: Structure((OfEvery(2, 4),)) for n, _ in model.named_parameters() if n.endswith(LAYERS)}
        project(model, structures)
        both = {"dense kernels": OnGpu(model).model, "2:4 kernels": semi_structured(model, structures).model}
        for batch in map(int, batches.split(",")):
            images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.half)
            with torch.inference_mode():
                dense, sparse = (twin(images).float() for twin in both.values())
            error = float((sparse - dense).norm() / dense.norm())
            times = [[milliseconds(twin, images) for twin in both.values()] for _ in range(rounds)][2:]
            ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            rows.append([name, batch, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}x", f"{error:.1e}"])
            click.echo(rows[-1])
    headers = ["model", "batch", "dense kernels, ms", "2:4 kernels, ms", "faster", "relative difference of the logits"]
    text = "Median of forwards of 224 x 224 images in half precision, in turn.\n\n" + table(headers, rows, "md")
    write_results(out, "2:4 by torch's semi-structured kernels", environment(), text, rows)


if __name__ == "__main__":
    main()
