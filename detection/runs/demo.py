"""The whole way on the digits detection set: train, search, fine-tune, evaluate, draw, report."""

import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sidt.detection.data.digits import write_digits
from sidt.detection.runs.folder import open_run
from sidt.detection.runs.objective import Say
from sidt.detection.runs.page import write_page
from sidt.detection.runs.pipeline import draw, evaluate, finetune, search, train_dense

_CONFIG = "digits_swin.py"


def demo(folder: Path, options: Mapping[str, Any], device: str | None, say: Say) -> None:
    """Run all steps in a folder; a stopped demo goes on where it was.

    Args:
        folder: the run folder; the images lie in ``digits/`` in it.
        options: values that replace the config's, by dotted key.
        device: where scores and trials run; default: the config's.
        say: shows a line.
    """
    begin = time.perf_counter()
    say("training, search at 40 % fewer parameters, fine-tuning and evaluation: under 10 minutes on two CPU cores")
    say(write_digits(folder / "digits"))
    with resources.as_file(resources.files("sidt.configs") / "detection" / _CONFIG) as config:
        run = open_run(config, folder, options, {"device": device}, data_root=folder / "digits")
    say(train_dense(run))
    say(search(run, say))
    say(finetune(run))
    say(evaluate(run))
    say(draw(run, 4))
    say(f"report -> {write_page(run)}")
    say(f"{time.perf_counter() - begin:.0f} s in all")
