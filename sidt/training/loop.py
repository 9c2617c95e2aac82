"""One training loop, for training from scratch and for fine-tuning, and top-1 accuracy."""

import hashlib
import io
import math
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_model
from safetensors.torch import save as dump_tensors
from timm.data.mixup import Mixup
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm import tqdm

from sidt.errors import InputError
from sidt.files import read_json, replacing, write_json
from sidt.space.outputs import classes_of, heads_of
from sidt.training.batches import make_loader
from sidt.training.devices import own_accelerator, resolve_device, seeded_on
from sidt.training.digest import weights_digest
from sidt.training.evaluation import check_data, top1

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]

_PROGRESS = "training.json"
_FREE = {
    "workers",
    "device",
}  # may change between a run and its resumption: they are no part of what is computed


def _as_text(value: Any) -> Any:
    """YAML reads ``no`` as false."""
    return "no" if value is False else value


class TrainConfig(BaseModel):
    """How to train.

    Attributes:
        epochs: passes over the data; a last batch that is not full is left out.
        batch_size: images an update, over all processes together.
        lr: the highest learning rate.
        weight_decay: of weight matrices; biases and norms have none.
        opt: any optimiser timm knows.
        sched: how the learning rate falls to 0, update by update; ``constant`` does not fall.
        warmup_epochs: of linear increase; never more than a quarter of the run.
        mixup: alpha; 0 is off.
        cutmix: alpha; 0 is off. With both on, every batch takes one of them.
        smoothing: of the labels.
        ema: decay of a moving average of the weights, which then is the result; None is off.
        clip_grad: the largest gradient norm; None is off.
        seed: of order, augmentation, mixup and dropout.
        workers: processes that read images.
        device: ``auto`` is the first of CUDA, MPS and CPU that is there.
        precision: of the forward pass; the weights stay float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: int = Field(default=10, ge=0)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    opt: str = "adamw"
    sched: Literal["cosine", "tanh", "constant"] = "cosine"
    warmup_epochs: float = Field(default=1.0, ge=0)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    clip_grad: float | None = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_as_text)] = "no"

    @field_validator("opt")
    @classmethod
    def _known_optimiser(cls, name: str) -> str:
        if name not in list_optimizers():
            raise ValueError("timm has no such optimiser; adamw, sgd, lamb and muon are some it has")
        return name

    @model_validator(mode="after")
    def _even_batches(self) -> "TrainConfig":
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, not {self.batch_size}")
        return self


_FINETUNE: dict[str, Any] = {"lr": 5e-4, "warmup_epochs": 0.5, "smoothing": 0.0}


class DivergedError(InputError):
    """The loss or the weights became infinite or NaN. The last finished epoch is still in the folder."""


def label_loss(smoothing: float) -> Loss:
    """The mean cross-entropy of all heads with the labels, or with mixup's soft targets."""

    def loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        heads = heads_of(model(images))
        each = [functional.cross_entropy(head.float(), targets, label_smoothing=smoothing) for head in heads]
        return torch.stack(each).mean()

    return loss


def fit(
    model: nn.Module,
    train: Dataset[Any],
    config: TrainConfig,
    *,
    val: Dataset[Any] | None = None,
    folder: Path | None = None,
    loss: Loss | None = None,
    label: str = "train",
) -> list[dict[str, float]]:
    """Train a model in place; it ends with the averaged weights if ``config.ema`` is set.

    With ``folder`` the state is written after every epoch, and the same call continues from there; on a CPU
    the result is bit for bit that of an uninterrupted run. The process's random state is left as it was.

    Args:
        model: gives logits, batch x classes, or a tuple of them. It stays on the device it was trained on.
        train: samples of image and label.
        config: how to train.
        val: for top-1 accuracy after every epoch.
        folder: of the resumable state; it must be this run's own.
        loss: (model, images, targets) -> scalar, in place of the cross entropy. The targets are labels, or
            batch x classes probabilities where mixup or cutmix is on.
        label: what the progress bar calls it.

    Returns:
        For every epoch: epoch (from 1), loss (mean), lr (of the last update), top1 (a fraction, if ``val`` is
        given) and seconds.

    Raises:
        DivergedError: the loss or the weights are no longer finite.
        InputError: the data, the device or the state in ``folder`` does not go with the rest.
    """
    samples = check_data(model, train)
    if val is not None:
        check_data(model, val)  # not after the first epoch
    device = resolve_device(config.device)
    if config.precision == "fp16" and device.type != "cuda":
        raise InputError("precision is 'fp16', which needs a CUDA device; use bf16 or no")
    if not config.epochs:
        return []
    modes = [(module, module.training) for module in model.modules()]
    own_forward = "forward" in model.__dict__
    with own_accelerator(device, config.precision) as accelerator:
        run = _Run(model, train, samples, config, folder, loss, accelerator)
        try:
            return run.all_epochs(val, label)
        finally:
            accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False)
            if not own_forward:
                model.__dict__.pop("forward", None)  # accelerate leaves its own there
            for module, mode in modes:
                module.training = mode


def finetune(
    model: nn.Module,
    train: Dataset[Any],
    *,
    epochs: int = 10,
    folder: Path | None = None,
    val: Dataset[Any] | None = None,
    loss: Loss | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train a sliced model further: ``fit`` with defaults for it. The options are fields of ``TrainConfig``.

    Raises:
        InputError: an option is unknown or out of range, or as for ``fit``.
    """
    try:
        config = TrainConfig(**{**_FINETUNE, "epochs": epochs, **options})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(TrainConfig.model_fields)
            raise InputError(f"finetune has no option '{name}'; it has {known}") from None
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"finetune option {name}={first['input']!r}: {reason}" if name else reason) from None
    return fit(model, train, config, val=val, folder=folder, loss=loss, label="finetune")


class _Run:
    """One call of ``fit``: the parts that change from step to step, and their state on disk."""

    def __init__(
        self,
        model: nn.Module,
        train: Dataset[Any],
        samples: int,
        config: TrainConfig,
        folder: Path | None,
        loss: Loss | None,
        accelerator: Accelerator,
    ) -> None:
        self.train, self.config, self.folder, self.accelerator = train, config, folder, accelerator
        if config.batch_size % accelerator.num_processes:
            raise InputError(
                f"batch_size is {config.batch_size}, which {accelerator.num_processes} processes cannot "
                "share evenly; make it a multiple"
            )
        self.identity = _identity(model, train, samples, config, loss) if folder else {}
        self.history: list[dict[str, float]] = []
        self.samples, self.steps = samples, max(1, samples // config.batch_size)
        self.model = model.to(accelerator.device)
        self.ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
        optimizer = create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
        updates = config.epochs * self.steps
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            config.sched,
            num_epochs=updates,  # an "epoch" of one update keeps timm's arithmetic in whole numbers
            updates_per_epoch=1,
            step_on_epochs=False,
            warmup_epochs=min(round(config.warmup_epochs * self.steps), updates // 4),
            warmup_lr=config.lr / 100,
        )
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.mix: Mixup | None = None
        if config.mixup or config.cutmix:
            classes = classes_of(model) or len(getattr(train, "classes", ()))
            if not classes:
                raise InputError("mixup needs the number of classes; give the model a num_classes")
            self.mix = Mixup(  # type: ignore[no-untyped-call]
                config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes
            )
        self.loss = loss or label_loss(0.0 if self.mix else config.smoothing)

    def all_epochs(self, val: Dataset[Any] | None, label: str) -> list[dict[str, float]]:
        config, main = self.config, self.accelerator.is_main_process
        self._resume()
        done = len(self.history)
        if main:
            count = sum(p.numel() for p in self.model.parameters())
            tqdm.write(
                f"{label}: {config.epochs} epochs x {self.steps} steps of {config.batch_size}, "
                f"{self.samples:,} images, {count / 1e6:.2f} M parameters, on {self.accelerator.device}"
                + (f"; {done} epochs are done in {self.folder}" if done else ""),
                file=sys.stderr,
            )
        total = config.epochs * self.steps
        with tqdm(total=total, initial=done * self.steps, desc=label, disable=not main or done == config.epochs) as bar:
            for epoch in range(done + 1, config.epochs + 1):
                record = self._epoch(epoch, bar, label)
                if val is not None:
                    judged = self.ema.module if self.ema else self.model
                    record["top1"] = top1(judged, val, device=str(self.accelerator.device), workers=config.workers)
                record["seconds"] = time.perf_counter() - record["seconds"]
                self.history.append(record)
                self._save()
        if self.ema:
            self.model.load_state_dict(self.ema.module.state_dict())
        return self.history

    def _epoch(self, epoch: int, bar: Any, label: str) -> dict[str, float]:
        """One epoch. Its record's ``seconds`` is the time it began."""
        begin, config, accelerator = time.perf_counter(), self.config, self.accelerator
        loader = make_loader(
            self.train,
            config.batch_size,
            shuffle=True,
            workers=config.workers,
            seed=_seed(config.seed, epoch),
            drop_last=self.samples >= config.batch_size,
        )
        losses = []
        self.wrapped.train()
        with seeded_on(_seed(config.seed, epoch, accelerator.process_index), accelerator.device):
            for step, (images, targets) in enumerate(accelerator.prepare_data_loader(loader), start=1):
                update = (epoch - 1) * self.steps + step
                self.scheduler.step_update(update - 1)
                lr = max(group["lr"] for group in self.optimizer.param_groups)
                if self.mix:
                    even = len(images) // 2 * 2 or 1  # Mixup pairs images: a lone last one is left out
                    images, targets = self.mix(images[:even], targets[:even])
                with accelerator.autocast():
                    loss = self.loss(self.wrapped, images, targets)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise _diverged(f"the loss is {losses[-1]}", epoch, step, lr)
                accelerator.backward(loss)
                if config.clip_grad:
                    accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.ema:
                    self.ema.update(self.model, step=update)
                bar.set_description(f"{label} {epoch}/{config.epochs}", refresh=False)
                bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{lr:.1e}", refresh=False)
                bar.update()
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise _diverged("the weights are not finite", epoch, len(losses), lr)
        mean = accelerator.reduce(torch.tensor(losses, device=accelerator.device).mean(), "mean").item()
        return {"epoch": epoch, "loss": mean, "lr": lr, "seconds": begin}

    def _save(self) -> None:
        """Write the state. The JSON comes last, and it counts: if cut off before, the old state is left."""
        if self.folder is None:
            return
        if self.accelerator.is_main_process:
            epoch, scaler = len(self.history), self.accelerator.scaler
            with replacing(self.folder / f"training-{epoch}.safetensors") as path:
                path.write_bytes(dump_tensors({k: v.clone().contiguous() for k, v in self.model.state_dict().items()}))
            state = {
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "scaler": scaler.state_dict() if scaler else None,
            }
            with replacing(self.folder / f"training-{epoch}.pt") as path:
                buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
                torch.save(state, buffer)
                path.write_bytes(buffer.getvalue())
            write_json(self.folder / _PROGRESS, {"run": self.identity, "history": self.history})
            for old in self.folder.glob("training-*"):
                if old.stem != f"training-{epoch}":
                    old.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Take up the state in the folder, if there is one."""
        if self.folder is None or not (self.folder / _PROGRESS).exists():
            return
        progress = read_json(self.folder / _PROGRESS)
        advice = f"remove {self.folder} or choose another folder"
        try:
            run, history = progress["run"], progress["history"]
            for key in {**run, **self.identity}:
                there, here = run.get(key), self.identity.get(key)
                if there != here:
                    raise InputError(
                        f"{self.folder} holds another run: its {key} is {there!r}, here {here!r}; {advice}"
                    )
            stem = self.folder / f"training-{len(history)}"
            load_model(self.model, stem.with_suffix(".safetensors"))
            state = torch.load(stem.with_suffix(".pt"), map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except InputError:
            raise
        except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"the training state in {self.folder} is damaged ({reason}); {advice}") from None
        self.history = history


def _diverged(what: str, epoch: int, step: int, lr: float) -> DivergedError:
    return DivergedError(f"{what} at epoch {epoch}, step {step}, with lr {lr:.3g}; use a smaller lr (say, a third)")


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _identity(
    model: nn.Module, train: Dataset[Any], samples: int, config: TrainConfig, loss: Loss | None
) -> dict[str, Any]:
    """What a run is determined by, flat and JSON-able: a resumed run must have the same."""
    shapes = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        shapes.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    images = hashlib.sha256(np.asarray(getattr(train, "indices", ())).tobytes())
    return {
        **config.model_dump(mode="json", exclude=_FREE),
        "model": f"{type(model).__name__} {shapes.hexdigest()[:8]}",
        "training data": f"{samples} samples {images.hexdigest()[:8]}",
        "loss": getattr(loss, "__qualname__", type(loss).__name__) if loss else "cross entropy",
        "starting weights": weights_digest(model)[:8],
    }
