"""A partitioned model on this machine: predicted against measured, with 1, 2 and 4 workers of one thread.

    python benchmarks/partition.py

The prediction is the sum of pieces that are timed in turn with the partitioned model (sidt/partition/pieces.py).
Workers share the cores: more of them than cores gain nothing, and the prediction has to say so. Each number of workers
is tried twice: with memory for the whole model on each (rows are cut), and for a part of it (units are cut too).
"""

from pathlib import Path

import click
import timm
import torch
from results import environment, write_results

from sidt.partition.devices import Device
from sidt.partition.planner import partition
from sidt.partition.shards import difference, shard_of
from sidt.partition.workers import run_partition
from sidt.partition.workload import workload_of
from sidt.report.tables import table
from sidt.space.space import space_for

HERE = Path(__file__).parent
PARTS = {1: (1.0,), 2: (1.0, 0.6), 4: (1.0, 0.4)}  # of the sublayers' parameters that each worker has memory for
HEADERS = ["workers", "memory", "rows x units", "predicted ms", "measured ms", "off by", "speed-up", "difference"]


@click.command()
@click.option("--model", "name", default="deit_small_patch16_224", show_default=True)
@click.option("--images", default=8, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--out", default=str(HERE / "results" / "partition"), type=click.Path(path_type=Path))
def main(name: str, images: int, rounds: int, out: Path) -> None:
    """Measure all, then write the results."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where, rows, data = environment(), [], []
    model = timm.create_model(name).eval()
    space = space_for(model)
    sample = torch.randn(images, *space.trace.input_size)
    with torch.no_grad():
        expected = model(sample)
    load = workload_of(model, space, images)
    alone = None
    for count, parts in PARTS.items():
        for part in parts:
            memory = load.rest_bytes + part * (load.bytes - load.rest_bytes)
            devices = [
                Device(name=f"worker-{i}", memory=memory, macs_per_second=1e10, bandwidth=1e9) for i in range(count)
            ]  # alike, so that the plan is the same each time; what they really do is measured
            cut = partition(load, devices)
            shards = [shard_of(model, space, cut, index) for index in range(len(cut.devices))]
            found = run_partition(model, space, cut, shards, sample, rounds=rounds)
            predicted, error = found.predicted.seconds, difference(found.output, expected)
            alone = alone or found.seconds
            shares = ["{:.0%} x {:.0%}".format(*cut.share(0, kind)) for kind in ("heads", "mlp")]
            rows.append(
                [
                    len(cut.devices),
                    f"{part:.0%}",
                    ", ".join(shares),
                    f"{predicted * 1e3:.0f}",
                    f"{found.seconds * 1e3:.0f}",
                    f"{predicted / found.seconds - 1:+.1%}",
                    f"{alone / found.seconds:.2f}",
                    f"{error:.1e}",
                ]
            )
            data.append(
                {"workers": len(cut.devices), "part": part, "predicted": predicted, "measured": found.seconds}
                | {"difference": error, "plan": found.predicted.to_json()}
            )
            click.echo("  ".join(map(str, rows[-1])))
    text = (
        f"{name} with random weights, {images} images, one thread a worker, medians of {rounds} rounds. Rows x units "
        f"are the first worker's, of attentions and of MLPs; memory is the part of their parameters that each worker "
        f"has room for; speed-up is against one worker, measured; the difference is the largest from the whole model's "
        f"output.\n\n" + table(HEADERS, rows, "md")
    )
    write_results(out, "Partition: predicted against measured", where, text, data)


if __name__ == "__main__":
    main()
