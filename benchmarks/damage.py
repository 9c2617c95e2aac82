"""What happens to files: a tree of values, or bytes, changed in one place, by a seed."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

Random = np.random.Generator
Path_ = tuple[Any, ...]  # of keys and indices, from the root of a tree
DOUBLED = "is a key twice"
_DEPTHS = (50, 400, 900, 3_000, 20_000)
_HUGE = (10**6, 10**12, 2**63, 10**40, 1e308)


def places(tree: Any, at: Path_ = ()) -> list[Path_]:
    """The paths of all values of a tree, the root left out."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in inner for path in ((*at, key), *places(value, (*at, key)))]


def changed_tree(tree: Any, random: Random) -> tuple[Any, str]:
    """A copy of a tree with one value changed, and what was done in words."""
    tree = copy.deepcopy(tree)
    where = _drawn(tree, random)
    holder = tree
    for key in where[:-1]:
        holder = holder[key]
    value, key = holder[where[-1]], where[-1]
    says, change = _CHANGES[random.integers(len(_CHANGES))]
    if says == "key deleted":
        del holder[key]
    elif says == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(value))
    elif says == "renamed" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = change(value, random)
    return tree, f"{'.'.join(map(str, where))}: {says}"


def _drawn(tree: Any, random: Random) -> Path_:
    """A path, by going down: the few keys at the top are drawn as often as the many below them."""
    path: Path_ = ()
    while isinstance(tree, dict | list) and tree:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = keys[int(random.integers(len(keys)))]
        path, tree = (*path, key), tree[key]
        if random.random() < 0.35:
            break
    return path


def _other_type(value: Any, random: Random) -> Any:
    kinds: list[Any] = ["text", "", 1, 0, 1.5, True, [], {}, [1], {"a": 1}, str(value), [value]]
    return kinds[int(random.integers(len(kinds)))]


def _negative(value: Any, random: Random) -> Any:
    return [-v for v in value] if _numbers(value) else -value if _number(value) and value else -1


def _other_length(value: Any, random: Random) -> Any:
    if isinstance(value, list) and value:
        return value[:-1] if random.random() < 0.5 else [*value, value[-1]]
    if isinstance(value, str):
        return value[: len(value) // 2] if random.random() < 0.5 else value * 2
    return [value, value]


def _nested(value: Any, random: Random) -> Any:
    return _Nested(int(random.choice(_DEPTHS)), bool(random.random() < 0.5))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_number, value))


_CHANGES: tuple[tuple[str, Callable[[Any, Random], Any]], ...] = (
    ("another type", _other_type),
    ("another type", _other_type),
    ("key deleted", lambda value, random: None),
    ("null", lambda value, random: None),
    ("NaN", lambda value, random: float("nan")),
    ("infinity", lambda value, random: float("inf")),
    ("negative", _negative),
    ("one more", lambda value, random: value + 1 if _number(value) else [value]),
    ("huge", lambda value, random: _HUGE[int(random.integers(len(_HUGE)))]),
    ("another length", _other_length),
    ("twice", lambda value, random: [value, value]),
    ("renamed", lambda value, random: [value]),
    ("deep nesting", _nested),
)


class _Nested:
    """Lists or mappings in each other, which no writer of JSON or YAML could write without a deep stack itself."""

    def __init__(self, depth: int, lists: bool) -> None:
        self.depth, self.lists = depth, lists

    def text(self) -> str:
        """As JSON, which is YAML too."""
        begin, end = ("[", "]") if self.lists else ('{"a":', "}")
        return begin * self.depth + "0" + end * self.depth


def written(tree: Any, style: str) -> bytes:
    """A tree as the bytes of a JSON or YAML file."""
    nested: list[str] = []

    def mark(value: Any) -> Any:
        if isinstance(value, _Nested):
            nested.append(value.text())
            return f"NESTED-{len(nested) - 1}-"
        if isinstance(value, dict):
            return {key: mark(inner) for key, inner in value.items()}
        return [mark(inner) for inner in value] if isinstance(value, list) else value

    marked = mark(tree)
    text = json.dumps(marked, indent=1) if style == "json" else yaml.safe_dump(marked, sort_keys=False)
    for i, inner in enumerate(nested):
        mark_ = f"NESTED-{i}-"
        text = text.replace(f'"{mark_}"', inner) if style == "json" else text.replace(mark_, inner)
    return text.encode()


def changed_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """The bytes of a file with something done to them, and what in words."""
    at, kind = int(random.integers(len(data))), int(random.integers(7))
    if kind == 0:
        return data[:at], f"truncated at {at}"
    if kind == 1:
        noise = random.bytes(int(random.integers(1, 9)))
        return data[:at] + noise + data[at + len(noise) :], f"random bytes at {at}"
    if kind == 2:
        return random.bytes(min(len(data), 4096)), "random bytes throughout"
    if kind == 3:
        coding = ("utf-16", "utf-8-sig", "cp037")[int(random.integers(3))]
        return data.decode("latin-1").encode(coding, "replace"), f"encoded as {coding}"
    if kind == 4:
        return data[:at] + b"\xe4\xff" + data[at:], f"bytes that are no UTF-8 at {at}"
    if kind == 5:
        return (b"", b"\0" * len(data), b"\n", b"null", b"[]", b"{}")[int(random.integers(6))], "emptied"
    length = int(random.integers(1, max(2, len(data) // 4)))
    return data[:at] + data[at : at + length] * 2 + data[at + length :], f"{length} bytes twice at {at}"


def doubled_key(text: str, random: Random, style: str) -> tuple[str, str] | None:
    """A key of a block of YAML or JSON written twice, once with another value; ``None`` where it has none."""
    lines = text.splitlines()
    keys = [i for i, line in enumerate(lines) if ": " in line and not line.lstrip().startswith(("#", "-", "{"))]
    if not keys:
        return None
    at = keys[int(random.integers(len(keys)))]
    key = lines[at].split(": ")[0]
    doubled = f"{key}: 7,"[: None if style == "json" else -1]
    return "\n".join([*lines[:at], doubled, *lines[at:]]), f"{key.strip()} {DOUBLED}"


def changed_tensors(data: bytes, random: Random) -> tuple[bytes, str]:
    """A safetensors file with its header changed, or with bytes of it or of its tensors."""
    if random.random() < 0.4:
        return changed_bytes(data, random)
    length = int.from_bytes(data[:8], "little")
    header, says = changed_tree(json.loads(data[8 : 8 + length]), random)
    text = written(header, "json")
    return len(text).to_bytes(8, "little") + text + data[8 + length :], says
