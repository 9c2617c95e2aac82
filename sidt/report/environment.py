"""What a bug report needs to know of the machine: versions, the processor, the GPUs."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from sidt.cost.clock import processor

# What is installed under these names is said; of the rest nothing is.
_PACKAGES = (
    *("sidt", "torchvision", "timm", "optuna", "numpy", "accelerate", "safetensors", "huggingface-hub"),
    *("transformers", "onnx", "onnxruntime", "onnxscript", "psycopg", "pymysql"),
    *("onedl-mmdetection", "onedl-mmengine", "onedl-mmcv", "mmdet", "mmengine", "mmcv"),
    *("pycocotools", "faster-coco-eval"),
)


def environment_rows() -> list[list[str]]:
    """Pairs of what it is and what is here: Python, platform, processor, CUDA, then every package that is installed."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = [
        ["Python", platform.python_version()],
        ["platform", platform.platform()],
        ["processor", processor()],
        ["torch threads", str(torch.get_num_threads())],
        ["torch", torch.__version__],  # with its build, which the package's own version leaves out
        ["CUDA", f"{torch.version.cuda}: {', '.join(gpus)}" if gpus else "no GPU"],
    ]
    for name in _PACKAGES:
        try:
            rows.append([name, version(name)])
        except PackageNotFoundError:
            continue
    return rows
