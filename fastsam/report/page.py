"""One self-contained HTML page about one or more training runs."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from fastsam.extras import requires_extra
from fastsam.files import write_text
from fastsam.longtail.results import Result
from fastsam.report import palette
from fastsam.report.collect import Runs, read_runs
from fastsam.report.content import PageTable, sections
from fastsam.report.formats import Format, lines, shown
from fastsam.report.groups import by_settings, data_title
from fastsam.report.text_table import range_text

_HERE = Path(__file__).parent


def write_report(folder: str | Path) -> Path:
    """Write ``folder/report.html`` about the runs in ``folder`` and return its path.

    The page holds its figures and needs no other file and no network.
    """
    return write_page(read_runs(folder), folder)


def write_page(runs: Runs, folder: str | Path) -> Path:
    """Write ``folder/report.html`` about runs that were read, and return its path."""
    page = Path(folder, "report.html")
    write_text(page, render(runs))
    return page


def render(runs: Runs) -> str:
    """Return the page as HTML text.

    Raises:
        ImportError: jinja2 or plotly is not installed.
    """
    with requires_extra("longtail", "the report"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup

    content = sections(runs)
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    # Autoescape everything but the files of the package.
    own = {
        name: Markup((_HERE / name).read_text("utf-8"))
        for name in ("page.css", "page.js", "charts.js")
    }
    titles = dict.fromkeys(map(data_title, runs.results))
    return environment.get_template("page.html.jinja").render(
        title="What helps the tail of this data?"
        if runs.comparison
        else f"fastsam: {'; '.join(titles)}",
        sets=_sets(runs.results),
        groups=[
            (group.name, palette.style(place)) for place, group in enumerate(by_settings(runs.runs))
        ],
        palette=palette,
        sections=content,
        own=own,
        plotly=Markup(_plotly()),
        data={
            "charts": [
                {"data": chart.data, "layout": chart.layout}
                for section in content
                for chart in section.charts
            ],
            "tables": {
                table.name: _languages(table) for section in content for table in section.tables
            },
        },
    )


@cache
def _plotly() -> str:
    """Return the plotting library, compressed: uncompressed, the page has 5 MB instead of 2 MB."""
    with requires_extra("longtail", "the report"):
        from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _languages(table: PageTable) -> dict[Format, list[list[Any]]]:
    """Return a table as CSV, Markdown and LaTeX."""
    return {
        format: [
            [line.start, line.cells, line.between, line.end, line.row]
            for line in lines(table.content, format)
        ]
        for format in get_args(Format)
    }


def _sets(results: Sequence[Result]) -> list[str]:
    """Describe each data set once."""
    counts: dict[tuple[str, int, int], list[Sequence[int]]] = {}
    for result in results:
        key = data_title(result), sum(result.counts), len(result.counts)
        counts.setdefault(key, []).append(result.counts)
    return [
        f"{title}: {images} training images in {classes} classes, {range_text(map(max, members))} in "
        f"the largest and {range_text(map(min, members))} in the smallest."
        for (title, images, classes), members in counts.items()
    ]
