"""A run without a config: a trained model, a folder of images and a budget."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sidt.errors import InputError
from sidt.export.models import create_model
from sidt.export.weights import read_weights
from sidt.runs import outcome, pipeline
from sidt.runs.config import RunConfig, override
from sidt.runs.folder import Run, started
from sidt.runs.images import data_of
from sidt.runs.models import dense_shapes, folder_of, prepared
from sidt.settings import parse
from sidt.space.outputs import classes_of

Say = Callable[[str], None]

# For whoever goes on with `sidt finetune`: gentle, since the repaired model is near the dense one.
_FINETUNE = {"epochs": 3, "lr": 5e-5, "warmup_epochs": 0.1, "smoothing": 0.0}


def shrinking_run(
    model: str,
    images: Path,
    budget: Mapping[str, Any],
    *,
    out: Path | None = None,
    checkpoint: Path | None = None,
    args: Mapping[str, Any] | None = None,
    classes: str | None = None,
    trials: int = 1,
    steps: int | None = None,
    skip_broken: bool = False,
    overrides: Sequence[str] = (),
    device: str | None = None,
    say: Say = print,
) -> Run:
    """A new run folder for a trained model and a folder of images.

    Args:
        model: a timm name, or ``hf:`` and one of Hugging Face's, with its published weights unless there is a
            checkpoint; a run or a checkpoint folder.
        images: the folder; see :class:`sidt.data.DataConfig`.
        budget: the bounds of :class:`sidt.Budget`.
        out: the run folder; default: ``runs/`` and the model's name.
        checkpoint: weights of one's own.
        args: keyword arguments for ``timm.create_model``.
        classes: a number, of the classes that the checkpoint has (default: what it says); or names, of the classes that
            are to be left, with commas between them.
        trials: of the search; 1 is the plain ranking.
        steps: in how many slices the small model is reached.
        skip_broken: whether images that cannot be decoded are left out.
        overrides: ``key=value`` texts that replace values of the config; see :func:`sidt.runs.config.read_config`.
        device: where it runs.
        say: told how the labels are taken.

    Raises:
        InputError: the model or the images cannot be used.
    """
    folder, args = folder_of(model), dict(args or {})
    names, number = _classes(classes)
    if number is not None:
        args["num_classes"] = number
    elif checkpoint is not None and folder is None and "num_classes" not in args:
        args |= _classes_of(model, args, checkpoint)
    published = folder is None and checkpoint is None
    tree: dict[str, Any] = {
        "model": {"name": model, "args": args, "pretrained": published, "checkpoint": checkpoint},
        "data": {"name": "folder", "root": images, "classes": names, "skip_broken": skip_broken},
        "budget": dict(budget),
        "steps": steps,
        "search": {"trials": trials},
        "finetune": dict(_FINETUNE),
        "teacher": {},
        "device": device or "auto",
    }
    for text in overrides:
        override(tree, text)
    config = prepared(parse(RunConfig, tree, "sidt shrink"))
    return started(folder_for(model, out), _with_labels(config, say))


def folder_for(model: str, out: Path | None) -> Path:
    """The run folder of a model."""
    return out or Path("runs") / Path(model.removeprefix("hf:")).name


def shrink_run(run: Run, say: Say) -> None:
    """All steps but the training: take the weights, score, search, slice, evaluate, report."""
    say(pipeline.train(run))
    say(pipeline.score(run, say))
    say(pipeline.search(run, say))
    for step in (pipeline.slice_, outcome.evaluate, outcome.write_report):
        say(step(run))


def _classes(text: str | None) -> tuple[tuple[str, ...] | None, int | None]:
    if text is None:
        return None, None
    if text.isdigit():
        return None, int(text)
    return tuple(name.strip() for name in text.split(",") if name.strip()), None


def _classes_of(model: str, args: Mapping[str, Any], checkpoint: Path) -> dict[str, int]:
    """The class count that a checkpoint's classifier has, as an argument for timm."""
    with torch.device("meta"):
        built: Any = create_model(model, args)
    heads = (getattr(built, "pretrained_cfg", None) or {}).get("classifier") or ()
    head = heads if isinstance(heads, str) else next(iter(heads), "")
    weight = read_weights(checkpoint).get(f"{head}.weight")
    return {} if weight is None or len(weight) == built.num_classes else {"num_classes": len(weight)}


def _with_labels(config: RunConfig, say: Say) -> RunConfig:
    """The config, which takes the folders of the images as labels only if they are as many as the model's classes."""
    model = dense_shapes(config.model)
    count, known = classes_of(model), data_of(config.data).known
    chosen = config.data.classes
    if chosen is not None:
        if count not in (len(known), len(chosen)):
            raise InputError(
                f"--classes needs a folder for each of the model's {count} classes in {config.data.root}, to know "
                f"which rows of its head are which; it has {len(known)}"
            )
        return config
    if not known or count == len(known):
        return config
    what = "features and no classes" if not count else f"{count:,} classes"
    say(
        f"{config.data.root} has {len(known):,} class folders and the model {what}: they are not taken as labels; the "
        "small model is made to be like the dense one, and judged by how far it is"
    )
    return config.model_copy(update={"data": config.data.model_copy(update={"labels": False})})
