"""Tables as CSV, Markdown and LaTeX, read back."""

from __future__ import annotations

import csv
import io
import re

import pytest

from fastsam.report.formats import Format, lines, text
from fastsam.report.text_table import TextTable, numbers_in

TABLE = TextTable(
    ("run", "all", "change", "cost", "setting"),
    (
        ("<script> & a|b_c", "80.1 +- 0.4", "+1.2 [0.3, 2.1]", "2.00x", "10 %"),
        ("$x$ {#} ~^\\ --rho", "9.0", "-0.5", "", "[1, 2]"),
        ("=1+1", "-", "nan", "1.00x", ""),
    ),
)


def test_csv_has_bare_numbers_with_deviations_and_intervals_in_columns() -> None:
    rows = list(csv.reader(io.StringIO(text(TABLE, "csv"))))
    assert rows[0] == [
        "run",
        "all",
        "all +-",
        "change",
        "change low",
        "change high",
        "cost",
        "setting",
    ]
    assert rows[1] == ["<script> & a|b_c", "80.1", "0.4", "1.2", "0.3", "2.1", "2.00", "10 %"]
    assert rows[2] == ["$x$ {#} ~^\\ --rho", "9.0", "", "-0.5", "", "", "", "[1, 2]"]
    assert rows[3][:3] == ["'=1+1", "", ""]


def test_markdown_cells_are_as_on_the_page() -> None:
    def cells(line: str) -> list[str]:
        inner = re.split(r"(?<!\\)\|", line)[1:-1]
        return [re.sub(r"\\(.)", r"\1", cell.strip()).replace("&amp;", "&") for cell in inner]

    header, rule, *rows = map(cells, text(TABLE, "md").splitlines())
    assert header == list(TABLE.header)
    assert rule == ["---", "---:", "---:", "---:", "---"]
    assert rows == [[cell.replace("+-", "±") for cell in row] for row in TABLE.rows]


def test_latex_escapes_all_that_is_a_command() -> None:
    found = text(TABLE, "tex").splitlines()
    assert found[:2] == [r"\begin{tabular}{lrrrl}", r"\toprule"]
    assert found[4] == (
        r"{<}script{>} \& a{|}b\_c & 80.1 $\pm$ 0.4 & $+$1.2 [0.3, 2.1] & 2.00x & 10 \% \\"
    )
    assert found[5] == (
        r"\$x\$ \{\#\} \textasciitilde{}\textasciicircum{}\textbackslash{} -{}-rho & 9.0 & $-$0.5 &  "
        r"& {[}1, 2{]} \\"
    )
    assert found[-2:] == [r"\bottomrule", r"\end{tabular}"]


@pytest.mark.parametrize("format", ["csv", "md", "tex"])
def test_every_line_has_a_cell_for_each_column_and_names_its_row(format: Format) -> None:
    found = lines(TABLE, format)
    assert [line.row for line in found if line.row is not None] == [0, 1, 2]
    assert {len(line.cells) for line in found if line.row is not None} == {len(TABLE.header)}


def test_a_table_without_rows_has_a_header() -> None:
    empty = TextTable(("a", "b"), ())
    assert text(empty, "csv") == "a,b\n"
    assert text(empty, "md") == "| a | b |\n| --- | --- |\n"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("8 +- 1e-05", ["8", "1e-05"]), ("inf", ["inf"]), ("3 apples", []), ("1 2", []), ("", [])],
)
def test_numbers_of_a_cell(cell: str, expected: list[str]) -> None:
    assert numbers_in(cell) == expected
