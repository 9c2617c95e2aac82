"""Structure inside weights: six systems, tiles by surgery and two references, of one model and its slice, in one table.

    python benchmarks/sparsity.py RUN [--sliced RUN] [--detector RUN] --out benchmarks/results/sparsity

RUN is a run folder with a dense model (``--dense`` of ``sidt compress``); the result of the other, which was sliced
with ``search.round_to=8`` so that tiles fit, is compressed likewise. The detector's run is one of ``sidt detect demo``.
What is in ``compressed/`` already is not done again. The control is trained on the same images, as long as the longest
of them, without a structure.
"""

import json
from pathlib import Path
from typing import Any

import click
import yaml
from results import environment, write_results

from sidt.detection.runs import compressing as detectors
from sidt.detection.runs.folder import open_run as open_detection_run
from sidt.report.kept import RESULT, STAGES
from sidt.report.tables import table
from sidt.runs.compressed import compress
from sidt.runs.folder import open_run

CONFIGS = Path(__file__).parents[1] / "configs" / "sparsity"
# What the original systems report, each on its own network: these rows are adapted from them, and reproduce none.
PUBLISHED = {
    "tprune": "1.16-1.92x faster, 0-8 % BLEU (Transformer, phones)",
    "ternary": "21x smaller, -1.74 / -0.94 top-1 / 5 (ResNet-18, ImageNet; 16x of it are the 2 bits)",
    "tiles": "up to 10x a layer, 2.6x faster (R(2+1)D, ZCU102)",
    "surgeon": "none: the tiles by Optimal Brain Surgeon",
    "memristor": "rows and columns of crossbars by ADMM, 8-bit levels",
    "levels": "the memristor framework's 8-bit levels alone",
    "smcd": "26.5 % of the computing and 14.2 % of the sending saved (phones)",
    "two_of_four": "reference",
    "int8": "reference: ONNX Runtime",
    "control": "no structure, trained alike",
}
PATDNN = "44.5x / 11.4x / 7.1x faster than TFLite / TVM / MNN (VGG, phones)"
CONTROL = {
    "structures": [{"layers": "blocks.*.weight", "structure": {}}],
    "finetune": {"epochs": 4, "lr": 3e-4, "batch_size": 64, "warmup_epochs": 0.1, "smoothing": 0.0},
    "teacher": {"features": 0.0},
    "images": 5000,
}
DETECTOR_CONTROL = {
    "structures": [{"layers": "neck.fpn_convs.*.weight", "structure": {}}],
    "finetune": {"epochs": 6, "lr": 5e-4},
    "teacher": {"features": 6.0},
}


def measured(
    folder: Path, name: str, *, dense: bool, detector: bool = False, collect: bool = False
) -> dict[str, Any] | None:
    """The numbers of one compression, done now unless they are there; ``None`` if they are only to be collected."""
    path = CONFIGS / f"{name}.yaml"
    if name == "control":
        path = folder / "control.yaml"
        path.write_text(yaml.safe_dump(DETECTOR_CONTROL if detector else CONTROL))
    result = folder / "compressed" / (f"dense-{name}" if dense else name) / RESULT
    if collect and not result.is_file():
        return None
    if not result.is_file() and detector:
        click.echo(detectors.compress(open_detection_run(folder), path, dense=dense, say=click.echo))
    elif not result.is_file():
        click.echo(compress(open_run(folder), path, dense=dense, say=click.echo))
    return json.loads(result.read_text())


def row_of(name: str, model: str, found: dict[str, Any]) -> list[Any]:
    """One row of the table."""
    weights = found["weights"].values()
    entries = sum(w["entries"] for w in weights)
    bits = sum(w["values"] + w["index"] + w["scales"] for w in weights)
    judged = [f"{100 * _quality(found[stage]):.1f}" if stage in found else "" for stage in STAGES]
    shares = [f"{left / whole:.0%} of {what}" for what, (whole, left) in found["modelled"].items()]
    times = found["latency_ms"]
    return [
        name,
        model,
        f"{sum(w['nonzero'] for w in weights) / entries:.0%}" if entries else "",
        f"{bits / entries:.2f}" if entries else "",
        f"{found['params'] / found['params_before']:.0%}",
        f"{found['dense_bytes'] / found['bytes']:.1f}x",
        *judged,
        ", ".join(shares),
        " / ".join(f"{how} {ms:.1f}" for how, ms in times.items()),
        PUBLISHED.get(name, PATDNN),
    ]


def _quality(row: dict[str, Any]) -> float:
    """Top-1, or the AP of boxes."""
    return float(row["bbox"]["AP"] if "bbox" in row else row["top1"])


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--sliced", type=click.Path(path_type=Path), help="A run whose result is compressed too.")
@click.option("--detector", type=click.Path(path_type=Path), help="A run of sidt detect on the digits.")
@click.option("--only", multiple=True, type=click.Choice(list(PUBLISHED)), help="Systems; default: all.")
@click.option("--collect", is_flag=True, help="Compress nothing: only the table of what is there.")
@click.option("--out", type=click.Path(path_type=Path), help="Results file, without its suffix.")
def main(
    run: Path, sliced: Path | None, detector: Path | None, only: tuple[str, ...], collect: bool, out: Path | None
) -> None:
    """Fill the table."""
    asked = [(run, "dense", name, False) for name in only or PUBLISHED]
    asked += [(sliced, "sliced", name, False) for name in only or PUBLISHED if sliced is not None]
    models = ("dense", "sliced") if detector is not None else ()
    asked += [(detector, model, name, True) for name in ("patdnn", "control") for model in models]
    rows, data = [], {}
    for folder, model, name, detects in asked:
        assert folder is not None
        found = measured(folder, name, dense=model == "dense", detector=detects, collect=collect)
        if found is not None:
            label = f"detector, {model}" if detects else model
            rows.append(row_of(name, label, found))
            data[f"{label} {name}"] = {k: v for k, v in found.items() if k != "survey"}
    headers = ["system", "model", "not zero", "bits", "params left", "smaller", *STAGES, "modelled"]
    text = table([*headers, "ms of the engine beside dense", "published, elsewhere"], rows, "md")
    click.echo(text)
    if out is not None:
        note = (
            "Top-1 in % on the 5,000 test images (one standard error 0.7), of detectors AP of boxes on 200: as it was; "
            "cut before purification; projected after the training towards the structure; after training under it. "
            "Bits: an entry of the weights that have a structure, index and scales included. Smaller: bytes of the "
            "file against the dense model's. One seed."
        )
        write_results(out, "Structure inside weights", environment(), f"{text}\n\n{note}", data)


if __name__ == "__main__":
    main()
