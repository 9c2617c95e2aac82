"""Training by MMEngine's Runner: its hooks, logging, AMP, resuming and launcher, from weights to weights.

What MMEngine prints is in ``console.log`` of the training's work folder, beside its own logs.
"""

import hashlib
import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, init_dist, is_distributed, is_main_process
from mmengine.runner import Runner

from sidt.detection.data.images import naming_images
from sidt.detection.detectors.checkpoints import read_checkpoint, weights_digest
from sidt.detection.training.console import Progress, told_to
from sidt.errors import InputError
from sidt.files import saying_full

Launcher = str  # MMEngine's: none, pytorch, slurm, mpi


def train(config: Config, weights: Path | None, states: Path, label: str, *, launcher: Launcher = "none") -> Path:
    """Train a detector as its config says; an interrupted training goes on from its last checkpoint.

    Args:
        config: the detector, its data and its schedule.
        weights: what it starts from; None: the start that the config gives it.
        states: where MMEngine's work folders are; this training's is named after all that determines it.
        label: the start of that name, and what the terminal calls it.
        launcher: MMEngine's, for several processes.

    Returns:
        The checkpoint of the last epoch.

    Raises:
        InputError: a checkpoint to go on from or an image is damaged, the training left no checkpoint, or it is to be
            of mixed precision without a GPU.
    """
    if (config.get("optim_wrapper") or {}).get("type") == "AmpOptimWrapper" and not torch.cuda.is_available():
        raise InputError(
            "mixed precision (--amp, optim_wrapper.type=AmpOptimWrapper) needs a CUDA device; train without"
        )
    own = states / f"{label}-{_digest(config, weights)}"
    config = prepared(config, own, launcher)
    if is_main_process():
        for old in states.glob(f"{label}-*"):
            if old != own:
                shutil.rmtree(old)
    found = _last_whole(own)  # not one that MMEngine would unpickle although it holds code
    if found is None and weights is not None:
        read_checkpoint(weights)
    config.resume = found is not None
    config.load_from = str(found or weights) if found or weights else None
    hooks = config.setdefault("default_hooks", {})
    saving = {"type": "CheckpointHook", "interval": 1, **(hooks.get("checkpoint") or {}), "save_last": True}
    if saving.get("max_keep_ckpts") == 1:
        saving["max_keep_ckpts"] = 2  # MMEngine removes an old one before it writes the next
    hooks["checkpoint"] = saving
    with saying_full(own), told_to(own), naming_images(config, "train_dataloader", "val_dataloader"):
        runner = Runner.from_cfg(config)
        runner.register_hook(Progress(label))
        runner.train()
    barrier()
    found = _last_whole(own)
    if found is None:
        raise InputError(f"the training left no checkpoint in {own}; check train_cfg and the CheckpointHook")
    return found


def _last_whole(folder: Path) -> Path | None:
    """The last checkpoint in a work folder, past those that MMEngine was writing as it was killed.

    Raises:
        InputError: there are some, and none can be read.
    """
    note = folder / "last_checkpoint"
    named = [folder / Path(text).name] if note.is_file() and (text := note.read_text().strip()) else []
    written = sorted(folder.glob("*_*.pth"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0), reverse=True)
    first = None
    for path in (*named, *(p for p in written if p not in named and not p.name.startswith("best_"))):
        try:
            read_checkpoint(path)  # MMEngine would unpickle a file that holds code
            return path
        except InputError as error:
            first = first or error
    if first is not None and len(written) > 1:
        raise first
    return None


def prepared(config: Config, work_dir: Path, launcher: Launcher) -> Config:
    """A copy of a config that MMEngine's Runner takes, on this machine, whatever ran in this process before."""
    config = Config(config.to_dict(), filename=config.filename)
    name = f"{work_dir.name}-{uuid.uuid4().hex[:8]}"  # MMEngine keeps one logger and one visualizer for each name
    config.work_dir, config.experiment_name, config.launcher = str(work_dir), name, launcher
    if config.get("visualizer"):
        config.visualizer["name"] = name
    if launcher != "none" and not torch.cuda.is_available():
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}
    return config


def join(launcher: Launcher) -> None:
    """Join the other processes of a launcher, if there are any; without a GPU they talk through gloo.

    Raises:
        InputError: the launcher did not start this process.
    """
    if launcher == "none" or is_distributed():
        return
    try:
        if torch.cuda.is_available():
            init_dist(launcher, backend="nccl")
        else:  # MMEngine's own way to join sets a CUDA device
            torch.distributed.init_process_group("gloo")
    except (KeyError, ValueError) as error:
        raise InputError(
            f"--launcher {launcher} did not start this process ({error}); start it with torchrun"
        ) from None


def _digest(config: Config, weights: Path | None) -> str:
    """Tells trainings apart: another config or another start does not go on from this one's state."""
    values: dict[str, Any] = {k: v for k, v in config.to_dict().items() if k not in ("load_from", "work_dir", "sidt")}
    digest = hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode())
    if weights is not None:
        digest.update(weights_digest(weights).encode())
    return digest.hexdigest()[:12]
