"""Rows -> a table that a person reads on a terminal, or tab-separated lines where the output is piped.

What a cell says is text from outside: it is printed as text, without markup and without control characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO


def show_table(head: Sequence[str], rows: Sequence[Sequence[Any]], stream: TextIO) -> None:
    """Print rows under their names; None shows as nothing, a float with at most six decimals."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not stream.isatty():
        for row in [list(head), *cells]:
            print("\t".join(row), file=stream)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(head):
        is_number = bool(rows) and all(isinstance(row[number], int | float | None) for row in rows)
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console(file=stream).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.6f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text)
