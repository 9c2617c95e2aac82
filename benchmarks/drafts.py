"""Which of timm's transformers a search-space file can be drafted for.

    python benchmarks/drafts.py [--names vit_tiny_patch16_224,xcit_nano_12_p8_224] [--state runs/drafts.jsonl]

A small architecture of each of some classes is built smaller, with random weights, as in ``timm_coverage.py``, and
`sidt spaces --draft` makes its file from one forward and checks it. What is known of each goes to the state at once,
and the same command goes on from there.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from results import environment, write_results
from timm_coverage import _input, known, shake, small_arguments

from sidt.errors import InputError
from sidt.export.models import create_model
from sidt.report.tables import table
from sidt.runs.drafting import drafted_for

HERE = Path(__file__).parent
NAMES = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "pvt_v2_b0",
    "eva02_tiny_patch14_224",
    "xcit_nano_12_p8_224",
    "twins_svt_small",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "crossvit_tiny_240",
    "mvitv2_tiny",
    "hiera_tiny_224",
    "levit_128s",
    "coat_lite_tiny",
    "convit_tiny",
    "pit_ti_224",
    "visformer_tiny",
    "tnt_s_legacy_patch16_224",
    "volo_d1_224",
    "nest_tiny",
    "davit_tiny",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "samvit_base_patch16",
    "swinv2_cr_tiny_224",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "gcvit_xxtiny",
    "maxvit_pico_rw_256",
    "tiny_vit_5m_224",
    "naflexvit_base_patch16_gap",
)


def tried(name: str) -> dict[str, Any]:
    """What becomes of the draft for an architecture."""
    found: dict[str, Any] = {"class": "?", "name": name, "drafted": False, "checked": False}
    try:
        arguments = small_arguments(name)
        model = shake(create_model(name, arguments)).eval()
        found["class"] = f"{type(model).__module__.removeprefix('timm.models.')}.{type(model).__name__}"
        with tempfile.TemporaryDirectory() as folder:
            drafted = drafted_for(model, Path(folder) / "draft.yaml", _input(model, arguments))
    except Exception as error:  # one that no InputError answers is a bug of ours, and shows here by its type
        sort = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return {**found, "why": sort + " ".join(str(error).split())[:300]}
    free = [] if drafted.space is None else [d for d in drafted.space.dimensions.values() if not d.fixed]
    return {
        **found,
        "drafted": True,
        "checked": drafted.space is not None,
        "searched": sorted({d.kind for d in free}),
        "left": drafted.draft.left,
        "look": list(drafted.draft.look),
        "why": drafted.why[:300],
    }


def measured(names: Sequence[str], state: Path) -> Iterator[dict[str, Any]]:
    """What is known of architectures, each written to the state before the next."""
    state.parent.mkdir(parents=True, exist_ok=True)
    before = known(state)
    with state.open("a", encoding="utf-8") as file:
        for name in names:
            if name not in before:
                begin = time.perf_counter()
                before[name] = tried(name)
                print(json.dumps(before[name]), file=file, flush=True)
                took = time.perf_counter() - begin
                click.echo(f"{name}: checked {before[name]['checked']} {before[name]['why']} ({took:.1f} s)", err=True)
            yield before[name]


def rows_of(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each class: whether it was drafted and passed, what is searched, what stays whole, and why."""
    rows = []
    for one in found:
        stays = "; ".join([*([one["left"]] if one.get("left") else []), *one.get("look", [])])
        yes = ["yes" if one[what] else "no" for what in ("drafted", "checked")]
        rows.append(
            [one["class"], one["name"], *yes, ", ".join(one.get("searched", [])), stays[:200], one["why"][:160]]
        )
    return [[cell.replace("|", "/") for cell in row] for row in rows]


@click.command()
@click.option("--names", default="", help="Names of architectures, separated by commas; default: one of each class.")
@click.option("--state", type=click.Path(path_type=Path), default=Path("runs/drafts.jsonl"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "drafts", show_default=True)
def main(names: str, state: Path, out: Path) -> None:
    """Draft a file for one architecture of every class."""
    torch.set_grad_enabled(False)
    found = list(measured(list(filter(None, names.split(","))) or list(NAMES), state))
    checked = sum(one["checked"] for one in found)
    inside = sum(bool({"heads", "qk", "v"} & set(one.get("searched", []))) for one in found)
    head = ["class", "architecture", "drafted", "checked", "searched", "stays whole, or is to be looked at", "why"]
    text = "\n".join(
        [
            "Drafted from one forward of a small model with random weights, and checked: of half of each dimension,",
            "the slice computes what the mask does, and has the parameters and multiply-adds that the space says.",
            "`why`: of what did not pass, the reason; else why a bolder draft did not.",
            "",
            f"**{checked} of {len(found)}** classes have a draft that passed its check; the others say why not.",
            f"In {inside} of them heads, q/k or v are searched; elsewhere MLPs, and some widths.",
            "",
            table(head, rows_of(found), "md"),
        ]
    )
    write_results(out, "Search-space files drafted for timm's transformers", environment(), text, found)


if __name__ == "__main__":
    main()
