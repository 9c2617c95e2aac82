"""What a terminal shows of MMEngine's work: one bar, and one line an epoch. MMEngine's own words go to files."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from tqdm import tqdm

from sidt.errors import InputError

LOG = "console.log"


@contextmanager
def told_to(folder: Path) -> Iterator[None]:
    """While the block runs, what it prints goes to ``console.log`` of a folder; a Runner that is made in it stays so.

    Its loggers write to the standard output that there is when it is made. Errors and warnings of Python go where they
    always go.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / LOG).open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose a writable output folder") from None
    with redirect_stdout(log):  # it stays open: the loggers have it
        yield


class Progress(Hook):
    """A bar of a training or a test, and a line for each epoch and each validation.

    Args:
        label: what it is, before the bar.
    """

    priority = "VERY_LOW"

    def __init__(self, label: str) -> None:
        """Nothing is shown before the work begins."""
        self.label, self.losses, self.began = label, list[float](), 0.0
        self.bar: Any = None

    def before_train(self, runner: Runner) -> None:
        """Say what there is to do."""
        batches, count = len(runner.train_dataloader), sum(p.numel() for p in runner.model.parameters())
        device = next(runner.model.parameters()).device
        self._say(
            f"{self.label}: {runner.max_epochs} epochs x {batches} steps of {runner.train_dataloader.batch_size}, "
            f"{count / 1e6:.2f} M parameters, on {device}"
            + (f"; {runner.epoch} epochs are done in {runner.work_dir}" if runner.epoch else "")
        )
        self.bar = tqdm(total=runner.max_iters, initial=runner.iter, desc=self.label, disable=not is_main_process())

    def before_train_epoch(self, runner: Runner) -> None:
        """Its losses and its time begin."""
        self.losses, self.began = [], time.perf_counter()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Show the loss and the learning rate."""
        loss = (outputs or {}).get("loss")
        if loss is not None:
            self.losses.append(float(loss.detach()))
            rates = runner.optim_wrapper.get_lr()
            lr = max(map(float, rates.get("lr", rates.get("base_lr", [0.0]))))
            self.bar.set_postfix(loss=f"{self.losses[-1]:.3f}", lr=f"{lr:.1e}", refresh=False)
        self.bar.set_description(f"{self.label} {runner.epoch + 1}/{runner.max_epochs}", refresh=False)
        self.bar.update()

    def after_train_epoch(self, runner: Runner) -> None:
        """A line."""
        mean = sum(self.losses) / len(self.losses) if self.losses else float("nan")
        seconds = time.perf_counter() - self.began
        self._say(f"{self.label} {runner.epoch + 1}/{runner.max_epochs}: loss {mean:.3f}, {seconds:.0f} s")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """A line with the metrics."""
        shown = ", ".join(f"{k} {v:.3f}" for k, v in (metrics or {}).items() if v >= 0 and not k.endswith("_copypaste"))
        self._say(
            f"{self.label} {runner.epoch}/{runner.max_epochs}, validation: {shown or 'no score, nothing was found'}"
        )

    def after_train(self, runner: Runner) -> None:
        """The bar ends."""
        self.bar.close()

    def before_test(self, runner: Runner) -> None:
        """A bar of batches."""
        self.bar = tqdm(total=len(runner.test_dataloader), desc=self.label, disable=not is_main_process())

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """One more."""
        self.bar.update()

    def after_test(self, runner: Runner) -> None:
        """The bar ends."""
        self.bar.close()

    def _say(self, line: str) -> None:
        if is_main_process():
            tqdm.write(line, file=sys.stderr)
