"""Figures of matplotlib without a global backend, as SVG text, PDF or PNG."""

from __future__ import annotations

import io
from typing import Any

from fastsam.extras import requires_extra

_INCHES_PER_LETTER, _INCHES_PER_MARK, _INCHES_PER_LINE = 0.075, 0.5, 0.19
"""Sizes in a legend of 8 points."""
_PRINTED: dict[Any, Any] = {"svg.hashsalt": "fastsam", "pdf.fonttype": 42}
"""Without metadata and with a fixed salt, the same numbers give the same file; letters stay letters."""


def new_figure(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Any, Any]:
    """Return a figure and its axes, an array ``[rows, columns]``; ``options`` are those of ``subplots``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # The object interface needs no global backend and leaves the caller's figures alone.
    with requires_extra("plots", "a figure"):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def svg(figure: Any) -> str:
    """Return a figure as SVG text."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = _saved(figure, format="svg", metadata=nothing).decode()
    return text[text.index("<svg") :]


def pdf(figure: Any) -> bytes:
    """Return a figure as a PDF file."""
    return _saved(
        figure, format="pdf", metadata=dict.fromkeys(("CreationDate", "Creator", "Producer"))
    )


def png(figure: Any) -> bytes:
    """Return a figure as a PNG file."""
    return _saved(figure, format="png", dpi=120)


def _saved(figure: Any, **options: Any) -> bytes:
    with requires_extra("plots", "a figure"):
        import matplotlib
    file = io.BytesIO()
    with matplotlib.rc_context(_PRINTED):
        figure.savefig(file, **options)
    return file.getvalue()


def legend_below(figure: Any, *axes: Any) -> None:
    """Add a legend of any length below all axes; the figure grows by it, so that they keep their size.

    Args:
        figure: the figure.
        *axes: axes whose lines it names, each name once.
    """
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels, handles = list(entries), list(entries.values())
    width, height = figure.get_size_inches()
    columns = max(int(width / (_INCHES_PER_LETTER * max(map(len, labels)) + _INCHES_PER_MARK)), 1)
    columns = min(columns, len(labels))
    figure.set_size_inches(width, height + _INCHES_PER_LINE * -(-len(labels) // columns))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
