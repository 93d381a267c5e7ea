"""Color, dash and marker of each line: distinct for more than ten lines, also with deuteranopia.

The colors come from a random search that started at the palette of Okabe and Ito (2008) and maximized the
smallest CIEDE2000 difference of two colors, in normal vision and under simulated deuteranopia and protanopia
(Machado et al. 2009), at a contrast of at least 3 with the background.
"""

from __future__ import annotations

from dataclasses import dataclass

LIGHT = ("#2b4dc3", "#d58000", "#06534d", "#b37e80", "#6d4d00", "#109dc7", "#11002e")
"""Colors on white."""
DARK = ("#7b8ef1", "#dba007", "#0c908c", "#e0c8ec", "#b16427", "#c2cca7", "#ffff16")
"""Colors on a dark page, in the same order."""
_DASHES = ((), (7, 3), (2, 2), (8, 2, 2, 2), (12, 3))
"""Lengths of strokes and gaps; empty for a solid line."""


@dataclass(frozen=True)
class Marker:
    """One shape under its three names.

    Attributes:
        plotly: name in a figure of the page.
        matplotlib: name in a printed figure.
        path: outline in an SVG picture, within a radius of 4 around the origin.
    """

    plotly: str
    matplotlib: str
    path: str


_MARKERS = (
    Marker("circle", "o", "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z"),
    Marker("square", "s", "M-3-3H3V3H-3Z"),
    Marker("diamond", "D", "M0-4L4 0L0 4L-4 0Z"),
    Marker("triangle-up", "^", "M0-4L4 3H-4Z"),
    Marker("triangle-down", "v", "M0 4L4-3H-4Z"),
    Marker("cross", "P", "M-1.3-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4V-1.3H-1.3Z"),
    Marker(
        "x", "X", "M-3.8-2L-2-3.8L0-1.8L2-3.8L3.8-2L1.8 0L3.8 2L2 3.8L0 1.8L-2 3.8L-3.8 2L-1.8 0Z"
    ),
    Marker("star", "*", "M0-4L1.2-1.2L4-1.2L1.8.8L2.6 3.6L0 2L-2.6 3.6L-1.8.8L-4-1.2L-1.2-1.2Z"),
)


@dataclass(frozen=True)
class Style:
    """How the lines and points of a run are drawn.

    Attributes:
        color: position in :data:`LIGHT` and :data:`DARK`.
        dash: lengths of strokes and gaps; empty for a solid line.
        marker: shape of the points.
    """

    color: int
    dash: tuple[int, ...]
    marker: Marker


def style(place: int) -> Style:
    """Return the style of line number ``place``, from 0.

    Colors repeat after 7 lines, then with another dash; markers have a period of 8, so that 35 lines differ
    in color or dash, and 280 differ.
    """
    dash = _DASHES[place // len(LIGHT) % len(_DASHES)]
    return Style(place % len(LIGHT), dash, _MARKERS[place % len(_MARKERS)])
