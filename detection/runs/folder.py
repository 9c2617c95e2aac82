"""A detection run's folder: how it is opened, and what the steps find there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from sidt.detection.data.sources import move_data
from sidt.detection.detectors.checkpoints import CONFIG, WEIGHTS, load_detector
from sidt.detection.detectors.configs import input_size_of, read_config
from sidt.detection.runs.settings import Settings
from sidt.errors import InputError
from sidt.runs.provenance import Chain, Step
from sidt.settings import parse
from sidt.space.finding import use_spaces
from sidt.training.devices import resolve_device

# Settings of a call that do not stay with the run: where and how long a step works is no part of what the run is.
OF_A_CALL = ("device", "timeout", "trials", "workers", "storage")
PLAN, SEARCH, EVALUATION = "search/plan.json", "search/search.json", "evaluation.json"
CHAIN = Chain(
    "sidt detect",
    {
        "train": Step("dense detector", "dense", (f"dense/{WEIGHTS}",)),
        "search": Step("sliced detector", "sliced", (PLAN, "sliced/plan.json", f"sliced/{WEIGHTS}"), ("train",)),
        "finetune": Step("fine-tuned detector", WEIGHTS, ("plan.json", WEIGHTS), ("search",)),
        "evaluate": Step("evaluation", EVALUATION, (EVALUATION,), ("train", "search", "finetune")),
        "report": Step("report", "report.html", (), ("search", "evaluate")),
    },
)


@dataclass(frozen=True)
class DetectionRun:
    """A run folder, the config of the dense detector, the settings in it, and what it differs in from its file.

    Attributes:
        folder: the run folder.
        config: of the dense detector, with what was replaced.
        settings: those of its section ``sidt``.
        options: values of the config that were replaced, by dotted key.
        data_root: the folder of the data, if it was replaced.
    """

    folder: Path
    config: Config
    settings: Settings
    options: Mapping[str, Any] = field(default_factory=dict)
    data_root: Path | None = None


def folder_for(source: Path, out: Path | None) -> Path | None:
    """The run folder that a config or a run folder stands for; ``None`` where :func:`open_run` refuses it."""
    if source.is_dir():
        return source if (source / "dense" / CONFIG).is_file() else None
    return out or Path("runs") / source.stem if source.is_file() else None


def open_run(
    source: Path,
    out: Path | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    data_root: Path | None = None,
) -> DetectionRun:
    """Open a run folder, or start one from an MMDetection config.

    Args:
        source: a run folder, or a config.
        out: the run folder for a config; default: ``runs/<name of the config>``.
        options: values that replace the config's, by dotted key.
        settings: values that replace those of its section ``sidt``; those of ``OF_A_CALL`` for this step alone.
        data_root: the folder that the data is in, if not the config's.

    Raises:
        InputError: the source is neither, or a value is wrong.
    """
    if source.is_dir():
        if not (source / "dense" / CONFIG).is_file():
            raise InputError(
                f"{source} is no detection run: it has no dense/{CONFIG}; start with a config: `sidt detect search "
                f"CONFIG --checkpoint FILE --out {source}`"
            )
        folder, path = source, source / "dense" / CONFIG
    else:
        folder, path = out or Path("runs") / source.stem, source
    config = read_config(path, options)
    if data_root is not None:
        move_data(config, data_root)
    own = config.to_dict().get("sidt") or {}
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    kept = {key: value for key, value in given.items() if key not in OF_A_CALL}
    checked, remembered = (parse(Settings, {**own, **new}, f"{path}, section sidt") for new in (given, kept))
    resolve_device(checked.device)
    use_spaces(*checked.spaces)
    config.sidt = remembered.model_dump(mode="json")
    return DetectionRun(folder, config, checked, dict(options or {}), data_root)


def detectors(run: DetectionRun) -> dict[str, Path]:
    """The folders of the detectors that the run has so far."""
    folders = {"dense": run.folder / "dense", "sliced": run.folder / "sliced", "fine-tuned": run.folder}
    return {name: folder for name, folder in folders.items() if (folder / WEIGHTS).is_file()}


def open_detector(run: DetectionRun, folder: Path) -> tuple[nn.Module, Config]:
    """One of the run's detectors, and its config with what was replaced."""
    detector, _ = load_detector(folder)
    config = read_config(folder / CONFIG, run.options)
    if run.data_root is not None:
        move_data(config, run.data_root)
    return detector, config


def existing(run: DetectionRun, name: str, step: str) -> Path:
    """The folder of one of the run's detectors.

    Raises:
        InputError: it is not there; the message names the step that makes it.
    """
    folder = run.folder / name
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} is not there; run `sidt detect {step}` first")
    return folder


def input_size(run: DetectionRun) -> tuple[int, int, int]:
    """Channels, height, width of the image that a run's costs are stated at."""
    return run.settings.input_size or input_size_of(run.config)
