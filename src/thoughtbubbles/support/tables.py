"""Tables of texts: in Markdown, in HTML and on a terminal."""

import html
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as ConsoleTable


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: above it.
        columns: headings; the first column is aligned left, the others right.
        rows: cells.
        note: below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown with its note, without its title."""
        return markdown_table(self.columns, self.rows) + (f"\n\n{self.note}" if self.note else "")

    def html(self) -> str:
        """The table in HTML with its note, without its title."""
        rows = "\n".join(_html_row(cells, "td") for cells in self.rows)
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return f'<div class="wide"><table>\n{_html_row(self.columns, "th")}\n{rows}\n</table></div>{note}'


def _html_row(cells: Iterable[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table in Markdown, without an end of its last line.

    Args:
        left: places of the columns that are aligned left; the others are aligned right.
    """
    lines = [" | ".join(row) for row in (columns, *rows)]
    lines.insert(1, " | ".join("---" if place in left else "---:" for place in range(len(columns))))
    return "\n".join(f"| {line} |" for line in lines)


def console_table(
    columns: Sequence[str], sections: Iterable[tuple[str, Iterable[Sequence[str]]]], **style: Any
) -> "ConsoleTable":
    """A table for a terminal, the first column aligned left and the others right.

    Args:
        sections: headings, "" for none, and the rows below them.
        style: arguments of rich's `Table`.
    """
    from rich.table import Table as ConsoleTable

    table = ConsoleTable(**style)
    for place, heading in enumerate(columns):
        table.add_column(heading, justify="right" if place else "left")
    for heading, rows in sections:
        if heading:
            table.add_row("")
            table.add_row(heading, style="bold")
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table
