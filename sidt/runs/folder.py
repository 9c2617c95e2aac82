"""A run folder: what the steps of a run leave there, and how they find it again."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sidt.errors import InputError
from sidt.export.checkpoint import load
from sidt.files import write_text
from sidt.runs.config import RunConfig, dump_config, read_config
from sidt.runs.models import prepared
from sidt.runs.provenance import Chain, Step
from sidt.space.plan import DimensionPlan, load_plan
from sidt.space.space import DimensionSpace
from sidt.training.devices import resolve_device

# What the search leaves has names of its own: the plan.json of the run folder belongs to the weights beside it.
PLAN, SEARCH, EVALUATION = "search/plan.json", "search/search.json", "evaluation.json"
CHAIN = Chain(
    "sidt",
    {
        "train": Step("dense model", "dense", ("dense/model.safetensors",)),
        "score": Step("scored model", "base", ("base/model.safetensors", "scores.safetensors"), ("train",)),
        "search": Step("plan", PLAN, (PLAN,), ("score",)),
        "slice": Step("sliced model", "sliced", ("sliced/plan.json", "sliced/model.safetensors"), ("score", "search")),
        "finetune": Step("fine-tuned model", "model.safetensors", ("plan.json", "model.safetensors"), ("slice",)),
        "evaluate": Step("evaluation", EVALUATION, (EVALUATION,), ("train", "slice", "finetune")),
        "report": Step("report", "report.md", (), ("search", "evaluate")),
    },
)


@dataclass(frozen=True)
class Run:
    """A run folder and the config of the run.

    Attributes:
        folder: the run folder.
        config: what this step goes by.
        remembered: what the next step will start from, if it is not the same: without the options of this call.
    """

    folder: Path
    config: RunConfig
    remembered: RunConfig | None = None

    @property
    def device(self) -> str:
        """The device of everything but a training that names its own."""
        return str(resolve_device(self.config.device))


def folder_for(source: Path, out: Path | None) -> Path | None:
    """The run folder that a config or a run folder stands for; ``None`` where :func:`open_run` refuses it."""
    if source.is_dir():
        return source if (source / "config.yaml").is_file() else None
    return out or Path("runs") / source.stem if source.is_file() else None


def open_run(source: Path, out: Path | None = None, overrides: tuple[str, ...] = (), once: tuple[str, ...] = ()) -> Run:
    """Open a run folder, or start one from a config.

    Args:
        source: a run folder, or a config file.
        out: the run folder for a config; default: ``runs/<name of the config>``.
        overrides: ``key=value`` texts; see :func:`sidt.runs.config.read_config`. They stay with the run.
        once: more of them, for this step alone.

    Raises:
        InputError: the source is neither, the config is wrong, or the folder cannot be written.
    """
    if source.is_dir() and not (source / "config.yaml").is_file():
        raise InputError(
            f"{source} is no run folder: it has no config.yaml; give a config, or a folder that `sidt run` made"
        )
    folder, path = folder_for(source, out), source / "config.yaml" if source.is_dir() else source
    if folder is None:
        raise InputError(f"{source} is neither a config file nor a run folder")
    once_too = read_config(path, (*overrides, *once))
    if source.is_file():
        return started(folder, once_too, read_config(path, overrides))
    return Run(folder, checked(once_too), read_config(path, overrides))


def started(folder: Path, config: RunConfig, remembered: RunConfig | None = None) -> Run:
    """A new run: its folder, with the config, which says how images are prepared."""
    run = Run(folder, prepared(checked(config)), None if remembered is None else prepared(remembered))
    remember(run)
    return run


def checked(config: RunConfig) -> RunConfig:
    """The config, whose device is there."""
    resolve_device(config.device)
    return config


def remember(run: Run) -> None:
    """Write the run's config to its folder. A step on a run folder does this once it has succeeded.

    What says what the run is stays, for the steps that come: the budget, the seed, whether it is a curve, the teacher,
    and whatever --set replaced. What says where and how long this call works does not: --device, --timeout, --trials
    and --storage. Who wants those for good writes them into the config, or gives them by --set.
    """
    write_text(run.folder / "config.yaml", dump_config(run.remembered or run.config))


def existing(run: Run, name: str, step: str) -> Path:
    """A file of the run.

    Raises:
        InputError: it is not there; the message names the step that writes it.
    """
    path = run.folder / name
    if not path.exists():
        raise InputError(f"{path} is not there; run `sidt {step} {run.folder}` first")
    return path


def dense_model(run: Run) -> nn.Module:
    """The dense model as it was trained."""
    return load(existing(run, "dense/config.json", "train").parent)


def base_model(run: Run) -> nn.Module:
    """The dense model in the basis of the scores and plans."""
    existing(run, "dense/config.json", "train")
    return load(existing(run, "base/config.json", "score").parent)


def searched_plan(run: Run, space: DimensionSpace) -> DimensionPlan:
    """The plan that the search found."""
    return load_plan(existing(run, PLAN, "search"), space)
