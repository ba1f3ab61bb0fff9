"""The table of all reports: text for a terminal and for Markdown files, cells for pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self


class Table(str):
    """A Markdown table, readable as plain text too, that keeps its cells for other formats.

    Attributes:
        head: The headings.
        rows: The cells of every row below, as many as there are headings.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __new__(cls, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Self:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        table = super().__new__(cls, "\n".join(lines))
        table.head, table.rows = head, rows
        return table
