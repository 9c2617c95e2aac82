"""What mmcv tells of its own build, and how to get a compiled one."""

from collections.abc import Callable
from typing import Any, NoReturn

import torchvision

from sidt.errors import InputError

__all__ = ["get_compiler_version", "get_compiling_cuda_version"]

# Build isolation would hide torch, and without torch mmcv's setup.py leaves the operators out. The cache may hold a
# wheel that was built so.
COMMAND = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps --no-binary onedl-mmcv"
PAGE = "https://onedl-mmcv.readthedocs.io/en/latest/get_started/build.html"


def refusal(name: str) -> Callable[..., NoReturn]:
    """A function that stands for an operator that is not provided."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        """Say which operator is missing, and how to get it.

        Raises:
            InputError: always.
        """
        from mmcv.version import __version__  # at call time: mmcv is being imported while this module is

        raise InputError(
            f"mmcv's operator {name!r} is not in torchvision; with a C++ compiler (and nvcc for a GPU), build mmcv "
            f"with its own operators: {COMMAND} onedl-mmcv=={__version__}, see {PAGE}"
        )

    return refuse


def get_compiler_version() -> str:
    """What stands in for the compiled operators."""
    return f"not compiled: torchvision {torchvision.__version__}"


def get_compiling_cuda_version() -> str:
    """The same: what runs on a GPU is torchvision's."""
    return get_compiler_version()
