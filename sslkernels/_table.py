"""Tables: by rich on a terminal where it is installed, in aligned plain text otherwise."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. A pipe or a file gets plain lines, a row each, whatever is installed."""
    if not (sys.stdout.isatty() and _printed_by_rich(title, columns, rows)):
        print(f"\n{title}\n{aligned(columns, rows)}")


def _printed_by_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    Console().print(table)
    return True


def _style(cell: str) -> str:
    return "green" if cell == "ok" else "bold red" if cell.startswith("FAIL") else ""


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line for each row, however wide: numbers that wrap as lines are read better than cells that do."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
