"""A table of figures, once, for Markdown and for HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Cells as they are to be read.

    Cells are plain text; ``**so**`` is strong in Markdown and in HTML alike.

    Args:
        title: of the table; "" for none.
        columns: their heads.
        rows: cells of each row, as many as there are columns.
        notes: sentences below the table: units, definitions, what is missing and why.
        align: "l" or "r" for each column; by default the first to the left, the others, which are
            figures, to the right.

    Raises:
        ValueError: if a row, or ``align``, does not fit the columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    align: str = ""

    def __post_init__(self) -> None:
        count = len(self.columns)
        for row in self.rows:
            if len(row) != count:
                raise ValueError(f"expected {count} cells, one a column, got {list(row)}")
        if not re.fullmatch("[lr]*", self.align) or len(self.align) not in (0, count):
            raise ValueError(f"align takes {count} letters l or r, got {self.align!r}")

    @property
    def alignment(self) -> str:
        """ "l" or "r" for each column."""
        return self.align or "l" + "r" * (len(self.columns) - 1)

    def to_markdown(self, level: int = 3) -> str:
        """Title (a heading of this level), table and notes, with a newline at the end."""
        rule = "|".join({"l": "---", "r": "---:"}[side] for side in self.alignment)
        lines = [_line(self.columns), f"|{rule}|", *(_line(row) for row in self.rows)]
        if self.title:
            lines = [f"{'#' * level} {self.title}", "", *lines]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """A ``figure`` of class "table": a caption, the table, a paragraph for each note.

        The table stands in a ``div`` of class "scroll", which a style sheet may let scroll where
        the page is too narrow; cells to the right have the class "r". The first cell of a row is
        its head. Intervals, as in "0.12 [0.10, 0.14]", stand in a ``span`` of class "interval".
        """
        parts = ['<figure class="table">']
        if self.title:
            parts.append(f"<figcaption>{_marked(self.title)}</figcaption>")
        parts.append('<div class="scroll"><table>')
        parts.append(
            f"<thead><tr>{self._cells(self.columns, heads=len(self.columns))}</tr></thead>"
        )
        parts.append("<tbody>")
        parts += [f"<tr>{self._cells(row, heads=1)}</tr>" for row in self.rows]
        parts.append("</tbody></table></div>")
        parts += [f'<p class="note">{_marked(note)}</p>' for note in self.notes]
        return "\n".join([*parts, "</figure>"]) + "\n"

    def _cells(self, cells: Sequence[str], heads: int) -> str:
        row = []
        for number, (cell, side) in enumerate(zip(cells, self.alignment, strict=True)):
            tag = "th" if number < heads else "td"
            attribute = ' class="r"' if side == "r" else ""
            row.append(f"<{tag}{attribute}>{_with_interval(cell)}</{tag}>")
        return "".join(row)


def number(value: float, digits: int = 3) -> str:
    """A figure with so many decimals; "-" where there is none (nan)."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def without_nan(value: Any) -> Any:
    """Dictionaries and lists of figures for JSON, which knows no nan: it becomes None."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _with_interval(cell: str) -> str:
    return re.sub(
        r" (\[[^\[\]]+, [^\[\]]+\])$", r' <span class="interval">\1</span>', _marked(cell)
    )


def _marked(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
