"""Tables, numbers and JSON as the commands print them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 160)
"""Standard output; in a file or a pipe lines are long enough for every table."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print rows of text under columns; a column whose cells start with a digit is set to the right."""
    rows = [list(row) for row in rows]
    made = Table(title=title and escape(title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows if row[index]]
        numeric = bool(cells) and all(cell[0].isdigit() for cell in cells)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        made.add_row(*map(escape, row))
    console.print(made)


def print_json(value: Any) -> None:
    """One JSON document on standard output; infinity and NaN, which JSON does not have, become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def print_json_line(value: Any) -> None:
    """One JSON document on one line."""
    print(json.dumps(_finite(value), ensure_ascii=False))


def millions(macs: float) -> str:
    """MACs as text in millions."""
    return f"{macs / 1e6:,.2f} M"


def number(value: float) -> str:
    """A measured value as text, to three digits or the unit."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{2 if value < 10 else 1}f}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as text in percent."""
    return "" if share is None else f"{100 * share:.2f} %"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
