"""Tables in other languages: CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fastsam.csv_text import csv_line
from fastsam.report.text_table import TextTable, numbers_in
from fastsam.text import one_line

Format = Literal["csv", "md", "tex"]
"""Suffixes of files with tables."""
_PARTS = {1: ("",), 2: ("", " +-"), 3: ("", " low", " high")}
"""What is added to the name of a column for each number of its cells."""
_LATEX = str.maketrans(
    {
        **{char: f"\\{char}" for char in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{char: f"{{{char}}}" for char in "<>|[]"},
    }
)
"""What LaTeX would take for a command, an option or another letter."""
_MARKDOWN = str.maketrans({char: f"\\{char}" for char in r"\`*_{}[]<>#|~$"} | {"&": "&amp;"})


@dataclass(frozen=True)
class Line:
    """A line of a table, cell by cell, so that the page can leave out columns and rows.

    Attributes:
        cells: one for each column, escaped; none in a line that columns do not change.
        start: text before the cells.
        between: text between two of them.
        end: text after them.
        row: number of the row of the table; None for a line around the rows.
    """

    cells: Sequence[str] = ()
    start: str = ""
    between: str = ""
    end: str = ""
    row: int | None = None

    def __str__(self) -> str:
        """Return the line as it is written, without line break."""
        return f"{self.start}{self.between.join(self.cells)}{self.end}"


def lines(table: TextTable, format: Format) -> list[Line]:
    """Return a table in one of the formats."""
    return _WRITERS[format](table)


def text(table: TextTable, format: Format) -> str:
    """Return a table as the content of a file in one of the formats."""
    return "".join(f"{line}\n" for line in lines(table, format))


def _csv(table: TextTable) -> list[Line]:
    """Numbers are bare: a deviation and the ends of an interval have columns of their own."""
    widths = [
        max(len(numbers_in(row[column])) for row in table.rows) if numeric else 0
        for column, numeric in enumerate(table.numeric)
    ]

    def cell(content: str, width: int) -> str:
        numbers = numbers_in(content) if width else []
        if not numbers:
            missing = width > 0 and content == "-"
            return _csv_text(["" if missing else content] + [""] * (width - 1))
        return ",".join([n.lstrip("+") for n in numbers] + [""] * (width - len(numbers)))

    header = [
        _csv_text([name + part for part in _PARTS[max(width, 1)]])
        for name, width in zip(table.header, widths, strict=True)
    ]
    rows = [[cell(*pair) for pair in zip(row, widths, strict=True)] for row in table.rows]
    return [Line(header, between=","), *(Line(r, between=",", row=i) for i, r in enumerate(rows))]


def _csv_text(values: list[str]) -> str:
    return csv_line(values).removesuffix("\n")


def _markdown(table: TextTable) -> list[Line]:
    def line(cells: Sequence[str], row: int | None = None) -> Line:
        return Line(cells, "| ", " | ", " |", row)

    rules = ["---:" if numeric else "---" for numeric in table.numeric]
    rows = [[one_line(cell).translate(_MARKDOWN) for cell in row] for row in _shown(table)]
    return [line(rows[0]), line(rules), *(line(row, i) for i, row in enumerate(rows[1:]))]


def _latex(table: TextTable) -> list[Line]:
    """Format a table as LaTeX, for the package booktabs."""

    def line(cells: Sequence[str], row: int | None = None) -> Line:
        return Line(cells, "", " & ", r" \\", row)

    columns = ["r" if numeric else "l" for numeric in table.numeric]
    rows = [[_latex_cell(cell) for cell in row] for row in _shown(table)]
    return [
        Line(columns, r"\begin{tabular}{", "", "}"),
        Line(start=r"\toprule"),
        line(rows[0]),
        Line(start=r"\midrule"),
        *(line(row, i) for i, row in enumerate(rows[1:])),
        Line(start=r"\bottomrule"),
        Line(start=r"\end{tabular}"),
    ]


def _latex_cell(cell: str) -> str:
    """Numbers with a real minus; text as it is."""
    if numbers_in(cell.replace(" ± ", " +- ")):
        return cell.replace("-", "$-$").replace("+", "$+$").replace(" ± ", r" $\pm$ ")
    return one_line(cell).translate(_LATEX).replace("--", "-{}-")


def shown(cell: str) -> str:
    """Return a cell as people read it."""
    return cell.replace(" +- ", " ± ")


def _shown(table: TextTable) -> list[list[str]]:
    """Return the header and the rows as shown to readers."""
    return [[shown(cell) for cell in row] for row in (table.header, *table.rows)]


_WRITERS: dict[Format, Callable[[TextTable], list[Line]]] = {
    "csv": _csv,
    "md": _markdown,
    "tex": _latex,
}
assert set(_WRITERS) == set(get_args(Format))
