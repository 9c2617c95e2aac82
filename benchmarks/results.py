"""What every results file says: where, when and with what it was measured."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sidt.files import write_json, write_text

_PACKAGES = ("torch", "torchvision", "timm", "optuna", "numpy", "fvcore", "torch-pruning", "nvidia-modelopt")
_DETECTION = ("onedl-mmdetection", "onedl-mmengine", "onedl-mmcv", "pycocotools")


def environment() -> dict[str, Any]:
    """Command, commit, date, machine and versions of this run."""
    versions = {}
    for name in (*_PACKAGES, *_DETECTION):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
        + "".join(f", {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())),
        "python": platform.python_version(),
        "versions": versions,
    }


def write_results(path: Path, title: str, where: dict[str, Any], text: str, data: Any) -> None:
    """Write the same results for people (``.md``) and for programs (``.json``)."""
    facts = "\n".join(f"- {key}: {value}" for key, value in where.items() if key != "versions")
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    write_text(path.with_suffix(".md"), f"# {title}\n\n{text}\n\n{facts}\n- versions: {versions}\n")
    write_json(path.with_suffix(".json"), {"environment": where, "results": data})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
