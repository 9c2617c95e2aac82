"""A run on the hub: its result, with a model card made of what the run measured."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from sidt.cost.complexity import ComplexityReport, report
from sidt.data.preparation import preparation_of
from sidt.errors import InputError
from sidt.export.checkpoint import files_of, load
from sidt.export.hub import check_name, upload
from sidt.export.models import name_of
from sidt.files import read_json
from sidt.report import text as reporting
from sidt.runs import provenance
from sidt.runs.config import RunConfig, read_config
from sidt.runs.folder import CHAIN
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for

_PICTURES = {"kept.png": "units kept", "search.png": "search"}
_PAPER = "https://arxiv.org/abs/2204.07722"
_WITH_TIMM = """timm builds it by itself too:

```python
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
```"""


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Put the result of a run, or a checkpoint folder, on the hub, in one commit.

    Of a run it is the fine-tuned model, or the sliced one where nothing was fine-tuned.

    Args:
        folder: of the run or the checkpoint.
        repository: ``OWNER/NAME``; made if it is not there. Its README.md becomes the card.
        private: whether it must be private.

    Returns:
        What went where, in one line.

    Raises:
        InputError: the folder has no model, or models of two plans; or the hub does not take it.
    """
    check_name(repository)
    config = read_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    own = folder
    if config is not None:
        provenance.inputs(folder, CHAIN, "report")
        own = next((f for f in (folder, folder / "sliced") if (f / "config.json").is_file()), folder)
        if not (own / "config.json").is_file():
            raise InputError(f"{folder} has no sliced model yet; run `sidt slice {folder}` first")
    model = load(own)  # what does not load does not leave
    says = read_json(own / "config.json")
    files: dict[str, Path | bytes] = {name: own / name for name in files_of(says)}
    pictures = [name for name in _PICTURES if config is not None and (folder / name).is_file()]
    files |= {name: folder / name for name in pictures}
    by_timm = "architecture" in says
    files["README.md"] = card(model, repository, folder, config, pictures, by_timm=by_timm).encode()
    address = upload(repository, files, private=private, message="A model made smaller by SiDT")
    which = "checkpoint" if config is None else "fine-tuned model" if own == folder else "sliced model"
    return f"{which} of {sum(p.numel() for p in model.parameters()):,} parameters -> {address}"


def card(
    model: nn.Module,
    repository: str,
    folder: Path,
    config: RunConfig | None,
    pictures: list[str],
    *,
    by_timm: bool = False,
) -> str:
    """The model card of a checkpoint, as the text of its README.md.

    Args:
        model: what is in the checkpoint.
        repository: where it goes.
        folder: of the run; or of the checkpoint, which has nothing measured.
        config: of the run.
        pictures: those of the run that go with it.
        by_timm: whether timm builds it by itself (:func:`sidt.export.to_timm`).
    """
    plan: DimensionPlan | None = getattr(model, "sidt_plan", None)
    space = space_for(model) if plan is None else plan.space
    dense, small = report(space, by="kind"), report(space, None if plan is None else plan.sizes, by="kind")
    source = name_of(model) or type(model).__name__
    path = folder / "evaluation.json"
    rows: dict[str, Any] = read_json(path) if config is not None and path.is_file() else {}
    size = ", ".join(map(str, dense.input_size))
    parts = [
        f"# {repository.split('/')[1]}",
        _size(source, dense, None if plan is None else small),
        "```python\n"
        "# with SiDT installed\n"
        "import sidt\nimport torch\n\n"
        f'model = sidt.load("hf-hub:{repository}")\n'
        f"logits = model(torch.zeros(1, {size}))\n```",
        *([_WITH_TIMM.format(repository=repository)] if by_timm else []),
        *([] if config is None else [_how(config)]),
        *([reporting.results_table(rows, "md"), _measured(rows, config)] if rows and config is not None else []),
        *(f"![{_PICTURES[name]}]({name})" for name in pictures),
        _costs(dense, None if plan is None else small),
    ]
    return f"---\n{_metadata(model, repository, config, rows, by_timm)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _size(source: str, dense: ComplexityReport, small: ComplexityReport | None) -> str:
    made = f"made smaller by [SiDT]({_PAPER})"
    if small is None:
        return f"timm's `{source}`, {made}: {dense.params:,} parameters and {dense.macs:,} multiply-adds."
    return (
        f"timm's `{source}`, {made}: {small.params:,} of its {dense.params:,} parameters and {small.macs:,} of its "
        f"{dense.macs:,} multiply-adds are left. It is a dense model of plain timm layers."
    )


def _how(config: RunConfig) -> str:
    """What was pruned and how."""
    searched = ", ".join(config.search.kinds or ("heads", "q/k and v sizes", "MLP sizes", "the width"))
    alike = ", the same in every block" if config.search.uniform else ""
    repair = ", aligned before it was scored and repaired in closed form after it was cut" if config.repair else ""
    return (
        f"Budget: {config.budget.value()}, on `{config.data.name}`. Scores by {config.score.method} on "
        f"{config.score.images} images; {config.search.trials} trials over {searched}{alike}{repair}. "
        f"Its {preparation_of(config.data)}."
    )


def _measured(rows: dict[str, Any], config: RunConfig) -> str:
    last = list(rows.values())[-1]
    what = reporting.quality(last)[0].capitalize()
    return (
        f"{what} on the {last['images']:,} test images of `{config.data.name}`, with one standard error. Latency: "
        f"median of one image on {last['device']}."
    )


def _costs(dense: ComplexityReport, sliced: ComplexityReport | None) -> str:
    return reporting.complexity_text(dense, sliced, "md")


def _metadata(model: nn.Module, repository: str, config: RunConfig | None, rows: dict[str, Any], by_timm: bool) -> str:
    """The YAML before a card, which the hub reads."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    results = None
    if rows and config is not None and "top1" in list(rows.values())[-1]:
        shown = rows.get("fine-tuned") or list(rows.values())[-1]
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=config.data.name,
                dataset_name=config.data.name,
                metric_type="accuracy",
                metric_name="top-1",
                metric_value=shown["top1"],
            )
        ]
    return str(
        ModelCardData(
            library_name="timm" if by_timm else "sidt",  # the hub shows how to load it
            pipeline_tag="image-classification" if getattr(model, "num_classes", 0) else "image-feature-extraction",
            tags=["sidt", "timm", "pruning", "model-compression", "vision-transformer"],
            base_model=cfg.get("hf_hub_id") if config is not None and config.model.pretrained else None,
            model_name=repository.split("/")[1] if results else None,
            eval_results=results,
        ).to_yaml()
    )
