"""The report as a page: one HTML file that loads nothing from outside.

A page is a list of sections, and a section a list of parts: facts, tables, plots, kept sizes, pictures. The functions
here make parts of plain values; ``page.html`` draws them, and escapes every text.
"""

import base64
import io
import json
import platform
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from sidt.cost.complexity import Row
from sidt.files import write_text
from sidt.report.text import percent
from sidt.space.plan import DimensionPlan

Part = dict[str, Any]

_KINDS = {"heads": "heads", "qk": "q/k per head", "v": "v per head", "mlp": "MLP", "width": "width"}
_SMALL = 64  # pixels a side; images up to here are shown as they are, pixel for pixel
_THUMB = 192


class Number(NamedTuple):
    """A number in a table, as it is sorted and as it is shown."""

    value: float
    text: str


class Share(float):
    """A fraction, shown in percent with a bar."""


class Box(NamedTuple):
    """A box on a picture, in its pixels; ``how`` says what it is: truth, right or wrong."""

    x: float
    y: float
    width: float
    height: float
    text: str
    how: str


# --- parts --------------------------------------------------------------------------------------------------------


def section(title: str, says: str, *parts: Part | None) -> dict[str, Any]:
    """A section: its title, a sentence or none, and its parts; None leaves one out."""
    return {"title": title, "says": says, "parts": [part for part in parts if part is not None]}


def facts(rows: Iterable[tuple[str, Any]]) -> Part:
    """Terms and what they are."""
    return {"kind": "facts", "rows": [(name, str(value)) for name, value in rows]}


def table(
    caption: str, headers: Sequence[str], rows: Iterable[Sequence[Any]], *, total: bool = False, sortable: bool = False
) -> Part:
    """A table whose first column names the rows.

    Args:
        caption: what to see in it.
        headers: of the columns.
        rows: cells: texts, whole numbers, a :class:`Number`, a :class:`Share`, or None where there is no value.
        total: whether the last row is the sum, which stays below when the others are sorted.
        sortable: whether a click on a header sorts.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [any(row[i]["numeric"] for row in cells) for i in range(len(headers))]
    body, foot = (cells[:-1], cells[-1:]) if total else (cells, [])
    parts = {"headers": list(zip(headers, numeric, strict=True)), "body": body, "foot": foot}
    return {"kind": "table", "caption": caption, "sortable": sortable, **parts}


def _cell(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value, "numeric": False}
    if value is None:
        return {"text": "-", "numeric": True, "sort": -1}
    if isinstance(value, Share):
        return {"text": f"{value:.1%}", "numeric": True, "sort": float(value), "bar": 100 * min(1.0, max(0.0, value))}
    if isinstance(value, Number):
        return {"text": value.text, "numeric": True, "sort": value.value}
    return {"text": f"{value:,}", "numeric": True, "sort": value}


def plot(caption: str, figure: Any) -> Part:
    """A plotly figure; its caption says what to see in one sentence. The page gives it its colours."""
    drawn = json.loads(figure.to_json())
    if title := drawn["layout"].get("yaxis", {}).get("title"):  # upright, it must fit beside the plot on a phone
        title["text"] = "<br>".join(textwrap.wrap(title["text"], 24))
    layout = {key: value for key, value in drawn["layout"].items() if key not in ("template", "title")}
    return {"kind": "plot", "caption": caption, "figure": {"data": drawn["data"], "layout": layout}}


def kept(plan: DimensionPlan) -> Part:
    """The kept sizes of a plan: widths, then a row for each block; which of its heads are kept."""
    dimensions, space = plan.space.dimensions, plan.space
    widths = [_size(plan, d.name, d.name) for d in dimensions.values() if d.kind == "width"]
    blocks = []
    for block in space.blocks():
        own = [d for d in space.in_block(block) if d.kind != "width"]
        blocks.append((space.title(block), [_size(plan, d.name, _KINDS.get(d.kind, d.name)) for d in own]))
    says = "Filled squares are the heads that stay; a bar is the part of the dense size that is left."
    return {"kind": "kept", "caption": says, "widths": widths, "blocks": blocks}


def _size(plan: DimensionPlan, name: str, label: str) -> dict[str, Any]:
    dimension, chosen = plan.space.dimensions[name], plan.keep[name]
    there = dimension.per is None or len(plan.keep[dimension.per]) > 0
    size = plan.sizes[name] if there else 0
    sizes = {"label": label, "kept": size, "dense": dimension.size}
    if dimension.kind != "heads":
        return {**sizes, "heads": None, "alt": ""}
    units = chosen.tolist()
    alt = f"heads kept of {dimension.size}: {', '.join(map(str, units)) or 'none'}"
    return {**sizes, "heads": [unit in units for unit in range(dimension.size)], "alt": alt}


def details(summary: str, text: str) -> Part:
    """A longer text, closed at first."""
    return {"kind": "details", "caption": summary, "text": text}


def pictures(caption: str, items: Sequence[Part], *, compared: bool = False) -> Part:
    """Pictures beside each other, see :func:`picture`; ``compared``: three in a row, on a phone too."""
    return {"kind": "pictures", "caption": caption, "items": list(items), "compared": compared}


def picture(image: Image.Image, alt: str, lines: Iterable[tuple[str, str, str]], boxes: Sequence[Box] = ()) -> Part:
    """One picture: what it shows in words, and the lines below it, each a term, a text, and ``right``, ``wrong`` or ''.

    Boxes lie over it; they are in the pixels of ``image``.
    """
    src, small = data_uri(image, _THUMB if not boxes else 2 * _THUMB)
    size = {"width": image.width, "height": image.height}
    return {"src": src, "small": small, "alt": alt, "lines": list(lines), "boxes": list(boxes), **size}


def data_uri(image: Image.Image, most: int) -> tuple[str, bool]:
    """An image as a data URI, at most so many pixels a side; and whether it is so small that it stays as it is."""
    small = max(image.size) <= _SMALL
    shown = image.convert("RGB")
    shown.thumbnail((most, most))
    buffer = io.BytesIO()
    if small:
        shown.save(buffer, "PNG", optimize=True)
    else:
        shown.save(buffer, "JPEG", quality=85)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{'png' if small else 'jpeg'};base64,{text}", small


def tile(name: str, before: str, after: str, says: str, share: float | None = None) -> dict[str, Any]:
    """A number at the head of the page: of the dense model and of the final one; ``share`` is drawn as a bar."""
    bar = None if share is None else 100 * min(1.0, share)
    return {"name": name, "before": before, "after": after, "says": says, "bar": bar}


def cost_tile(name: str, before: float, after: float, text: str = "{:,}") -> dict[str, Any]:
    """What is left of a cost; ``text`` formats both numbers."""
    share = after / before if before else 1.0
    return tile(name, text.format(before), text.format(after), f"{share:.1%} of the dense model's", share)


def complexity(dense: Mapping[str, Row], sliced: Mapping[str, Row], counted: str) -> Part:
    """Parameters and multiply-adds by part of the model, dense and sliced, with their sum; ``counted`` says how."""
    total = [
        Row("total", sum(r.params for r in of.values()), sum(r.macs for r in of.values())) for of in (dense, sliced)
    ]
    rows = []
    for name, (full, small) in [*((n, (r, sliced.get(n, Row(n, 0, 0)))) for n, r in dense.items()), ("total", total)]:
        kept_params = Share(small.params / full.params) if full.params else None
        kept_macs = Share(small.macs / full.macs) if full.macs else None
        rows.append([name, full.params, small.params, kept_params, full.macs, small.macs, kept_macs])
    headers = ["part", "params, dense", "params, sliced", "kept", "MACs, dense", "MACs, sliced", "kept"]
    caption = f"{counted} A click on a column sorts by it."
    return table(caption, headers, rows, total=True, sortable=True)


def made(packages: Iterable[str], device: str) -> Part:
    """What made the page: command, date, versions, machine."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    rows = [
        ("Command", without_passwords(shlex.join([_program(sys.argv[0]), *sys.argv[1:]]))),
        ("Date", f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"),
        ("Versions", f"{versions}, Python {platform.python_version()}"),
        ("Machine", f"{platform.system()} {platform.machine()}, models on {device}"),
    ]
    return facts(rows)


def _program(path: str) -> str:
    return "sidt" if Path(path).name == "__main__.py" else Path(path).name


def without_passwords(text: str) -> str:
    """A text without the passwords of the URLs in it, such as that of a study's storage."""
    return re.sub(r"(://[^\s/:@]*:)[^\s/@]+@", r"\1***@", text)


def compared(before: float, after: float) -> str:
    """How a fraction changed, in points of a percent."""
    points = 100 * (after - before)
    return f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}" if points else "the same"


def accuracy(part: float, error: float) -> Number:
    """An accuracy with its standard error, in percent."""
    return Number(part, f"{percent(part)} ± {100 * error:.2f}")


# --- the file -----------------------------------------------------------------------------------------------------


def write(
    path: Path, title: str, lead: str, tiles: Sequence[Mapping[str, Any]], sections: Sequence[Mapping[str, Any]]
) -> None:
    """Write a page, in one step.

    Args:
        path: the file.
        title: of the page.
        lead: one or two sentences below it.
        tiles: see :func:`tile`.
        sections: see :func:`section`; those without parts and words are left out.
    """
    shown = [one for one in sections if one["parts"] or one["says"]]
    files = {
        name: resources.files("sidt.report").joinpath(f"page.{name}").read_text("utf-8")
        for name in ("html", "css", "js")
    }
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files["html"])
    plots = any(part["kind"] == "plot" for one in shown for part in one["parts"])
    text = template.render(
        title=title,
        lead=lead,
        tiles=tiles,
        sections=shown,
        style=Markup(files["css"]),
        script=Markup(files["js"]),
        plotly=Markup(get_plotlyjs()) if plots else None,
    )
    write_text(path, text)
