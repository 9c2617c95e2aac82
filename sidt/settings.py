"""Values that a user writes, in YAML or in a config of MMEngine, checked by a class of pydantic's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sidt.errors import InputError
from sidt.files import load_yaml

Config = TypeVar("Config", bound=BaseModel)


def read_yaml(path: Path, kind: type[BaseModel], what: str = "config") -> dict[str, Any]:
    """The values of a YAML file.

    Args:
        path: the file.
        kind: the class that they are for, whose keys the message names.
        what: the file is, for the message.

    Raises:
        InputError: it cannot be read, is not YAML, or is no mapping.
    """
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the {what} {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(
            f"the {what} {path} must be a mapping with the keys {', '.join(kind.model_fields)}, got {tree!r}"[:600]
        )
    return tree


def parse(model: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Validate values as a config class; the error is one line and names the first wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("extra_forbidden", "missing"):
            wrong = "missing" if first["type"] == "missing" else "unknown key"
            message = f"{wrong}; known here: {', '.join(_known(model, first['loc']))}"
        seen = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        raise InputError(f"{source}: {key}: {message}{seen}"[:600]) from None


def _known(model: type[BaseModel], where: tuple[int | str, ...]) -> list[str]:
    for part in where[:-1]:
        field = model.model_fields.get(str(part))
        options = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if inner:
            model = inner[0]
    return list(model.model_fields)
