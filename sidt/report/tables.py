"""Tables as text."""

import csv
import io
from collections.abc import Sequence
from typing import Any, Literal

from tabulate import tabulate

Format = Literal["table", "md", "csv", "latex", "json"]
_TABULATE = {"table": "simple", "md": "github", "latex": "latex_booktabs"}


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], style: Format = "table") -> str:
    """Rows as text; numbers are aligned right and given as they come."""
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([headers, *rows])
        return buffer.getvalue().rstrip("\n")
    numeric = ["right" if rows and not isinstance(rows[0][i], str) else "left" for i in range(len(headers))]
    shown = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    align = ["right" if n == "right" else "left" for n in numeric]
    return tabulate(shown, headers, tablefmt=_TABULATE[style], colalign=align if rows else None, disable_numparse=True)
