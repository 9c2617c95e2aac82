"""Which search-space file is a model's: one of your own, of an installed package, or one that comes with SiDT.

Files of your own are on a search path: the environment variable ``SIDT_SPACES``, whose files and folders of files are
separated as in ``PATH``. Configs and the command line's ``--space`` put theirs there, so processes that are started
find them too. An installed package offers the files of one of its packages by an entry point of the group
``sidt.search_spaces``. A model that was sliced by a file of your own, or loaded with one, keeps it.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from sidt.errors import InputError
from sidt.space.families import Family, read_family

if TYPE_CHECKING:  # the files can be listed without it
    from torch import nn

SPACES = "SIDT_SPACES"
GROUP = "sidt.search_spaces"


@cache
def families() -> list[Family]:
    """The families that come with SiDT, by file name."""
    with resources.as_file(resources.files("sidt.search_spaces")) as folder:
        return [replace(read_family(file), text="") for file in sorted(folder.glob("*.yaml"))]


@cache
def _installed() -> list[Family]:
    """The families of installed packages."""
    found = []
    for point in entry_points(group=GROUP):
        try:
            with resources.as_file(resources.files(point.value)) as folder:
                found += [read_family(file) for file in sorted(folder.glob("*.yaml"))]
        except (ImportError, TypeError) as error:
            raise InputError(
                f"the entry point {point.name} = {point.value} ({GROUP}) names no package with search spaces: {error}"
            ) from None
    return found


@cache
def _read(file: Path, changed: int) -> Family:
    """A file, read once as long as it is not changed."""
    return read_family(file)


def _in(places: Iterable[Path]) -> list[Family]:
    """The families in some files, and in all YAML files of some folders."""
    files: list[Path] = []
    for place in places:
        inside = sorted(place.glob("*.yaml")) if place.is_dir() else [place]
        if not inside:
            raise InputError(f"the folder {place} has no search space: no file *.yaml is in it")
        files += inside
    return [_read(f, f.stat().st_mtime_ns if f.is_file() else 0) for f in dict.fromkeys(f.resolve() for f in files)]


def search_path() -> tuple[Path, ...]:
    """The files and folders of your own that are searched."""
    return tuple(Path(place) for place in os.environ.get(SPACES, "").split(os.pathsep) if place)


def use_spaces(*places: str | Path) -> None:
    """Search some files, or folders of files, too: in this process, and in those that it starts from now on.

    Raises:
        InputError: one cannot be read, or two are for one class.
    """
    wanted = dict.fromkeys([*(Path(place).absolute() for place in places), *search_path()])
    _by_class(_in(wanted))
    if wanted:
        os.environ[SPACES] = os.pathsep.join(map(str, wanted))


def own_families() -> list[Family]:
    """The families on the search path, and those of installed packages."""
    return [*_in(search_path()), *_installed()]


def _by_class(found: Iterable[Family]) -> dict[str, Family]:
    """The families by the names of the classes that they are for.

    Raises:
        InputError: two are for one class.
    """
    known: dict[str, Family] = {}
    for family in found:
        for name in family.models:
            if known.setdefault(name, family).file != family.file:
                raise InputError(
                    f"two search spaces are for {name}: {known[name].file} and {family.file}; take it out of one"
                )
    return known


def _known() -> dict[str, Family]:
    """The families by class; what is your own stands in place of what comes with SiDT."""
    return {**_by_class(families()), **_by_class(own_families())}


def lineage(model: "nn.Module") -> list[str]:
    """The names of a model's class and of those that it inherits from, the nearest first."""
    return [f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__]


def _nearest(model: "nn.Module", known: Mapping[str, Family]) -> Family | None:
    """The family that a model keeps, or that of its class or the nearest class that it inherits from."""
    kept = getattr(model, "sidt_family", None)
    return kept if isinstance(kept, Family) else next((known[n] for n in lineage(model) if n in known), None)


def own_family(model: "nn.Module") -> Family | None:
    """The family of a model whose file does not come with SiDT; ``None`` if it does, or if there is none."""
    found = _nearest(model, _known())
    return found if found is not None and found.text else None


def wrapped_in(model: "nn.Module") -> str | None:
    """The path of the model inside those that wrap one to train or compile it; ``None`` if it is not wrapped.

    They are torch's DataParallel, DistributedDataParallel and FullyShardedDataParallel, what ``torch.compile`` gives,
    and timm's moving averages.
    """
    return _path_inside(model, _known())


def _path_inside(model: "nn.Module", known: Mapping[str, Family]) -> str | None:
    path: list[str] = []
    inner = model
    while _nearest(inner, known) is None:
        for name in ("_orig_mod", "module"):
            if (found := inner._modules.get(name)) is not None:
                path.append(name)
                inner = found
                break
        else:
            return None
    return ".".join(path) or None


def family_of(model: "nn.Module", *places: Path) -> Family:
    """The family of a model's class, or of the nearest class that it inherits from.

    Args:
        model: what the family is wanted of.
        places: files, or folders of files, that alone are searched; default: what the model keeps, the search path,
            installed packages, and what comes with SiDT.

    Raises:
        InputError: there is none, or a file cannot be read.
    """
    known = _by_class(_in(places)) if places else _known()
    found = next((known[n] for n in lineage(model) if n in known), None) if places else _nearest(model, known)
    if found is not None:
        return found
    if (inner := _path_inside(model, known)) is not None:
        raise InputError(f"this {type(model).__name__} wraps a model; pass what is in it: model.{inner}")
    name = lineage(model)[0]
    if places:
        raise InputError(
            f"{', '.join(map(str, places))} is for {', '.join(known) or 'no class'}, and this model is {name}; "
            f"list its class under models"
        )
    alike = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    raise InputError(
        f"no search space for {name}; write a file for it (`sidt spaces MODEL --draft FILE` drafts one, "
        f"CONTRIBUTING.md shows how) and give it by --space FILE or {SPACES}, or use one of the {len(known)} classes "
        "that `sidt spaces` lists" + (f", such as {', '.join(sorted(alike))}" if alike else "")
    )
