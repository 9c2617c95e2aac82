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
        found = [(_place(values, wrong), wrong) for wrong in error.errors()]
        start = found[0][0]
        # Where a value may be of several forms, the form that it comes nearest to says what is wrong.
        place, first = max((each for each in found if each[0][: len(start)] == start), key=lambda each: len(each[0]))
        message, seen = first["msg"].removeprefix("Value error, "), f" (got {first['input']!r})"
        if first["type"] == "missing" and isinstance(first["loc"][-1], int):
            message = f"Input should have more than {first['loc'][-1]} values"
        elif (what := {"missing": "missing", "extra_forbidden": "unknown key"}.get(first["type"])) is not None:
            message = f"{what}; known here: {_known(model, place[:-1])}"
            seen = "" if first["type"] == "missing" else seen
        elif first["type"] == "model_type":
            message = f"Input should be a mapping with keys of {_known(model, place)}"
        key = ".".join(map(str, place)) or "the whole"
        raise InputError(f"{source}: {key}: {message}{seen}"[:600]) from None


def _place(values: Any, wrong: Any) -> tuple[int | str, ...]:
    """The part of an error's path that is of keys: the rest names forms that a value may have."""
    place = []
    for part in wrong["loc"]:
        try:
            values = values[part]
        except (TypeError, KeyError, IndexError):
            continue
        place.append(part)
    key = wrong["loc"][-1:] if wrong["type"] == "missing" and isinstance(values, Mapping) else ()
    return (*place, *key)


def _known(model: type[BaseModel], where: tuple[int | str, ...]) -> str:
    """The keys of the class that a place is for."""
    for part in where:
        field = model.model_fields.get(str(part))
        options = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if inner:
            model = inner[0]
    return ", ".join(model.model_fields)
