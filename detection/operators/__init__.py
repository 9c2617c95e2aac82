"""A stand-in for ``mmcv._ext``, mmcv's compiled operators, made of torchvision's operators and a few lines of torch.

It is found where no compiled ``mmcv._ext`` is, and nothing is written into mmcv's folder.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

NAME = "mmcv._ext"


def provide() -> None:
    """Let ``import mmcv._ext`` find the stand-in, if it finds nothing else. Imports neither torch nor mmcv."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # the last one: a compiled module is found first


class _Finder(MetaPathFinder):
    """Answers for one name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _Loader()) if fullname == NAME else None


class _Loader(Loader):
    """Makes the stand-in; the operators are imported here, and torch with them."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Operators(spec.name, __doc__)

    def exec_module(self, module: ModuleType) -> None:
        from sidt.detection.operators import boxes, build, deformable, losses, pooling, regions

        for source in (boxes, build, deformable, losses, pooling, regions):
            for name in source.__all__:
                setattr(module, name, getattr(source, name))


class _Operators(ModuleType):
    """Has every operator that mmcv asks for on import; what is not provided is refused when it is called."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from sidt.detection.operators.build import refusal

        return refusal(name)
