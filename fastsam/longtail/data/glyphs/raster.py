"""Anti-aliased filling of polygons, in integers: the same bits on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNITS = 256
"""Vertices are rounded to this fraction of a pixel."""
LINES = 4
"""Sample lines in a pixel; along a line coverage is exact."""
FULL = UNITS * LINES
"""Coverage of a pixel that lies inside."""

_SPACING = UNITS // LINES


def coverage(
    image: NDArray[np.int64],
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    *,
    count: int,
    size: int,
) -> NDArray[np.int32]:
    """How much of each pixel the polygons of each image cover.

    Covered is what the polygons wind around clockwise (as seen, with y down) at least once; what
    they wind around the other way, as a stroke does that was thinned to nothing, is not.

    Args:
        image: image that each edge belongs to, int64 ``[E]``.
        start: first point of each edge in pixels, x to the right and y down from the top left
            corner, float64 ``[E, 2]``; edges form closed polygons.
        end: last point of each edge, float64 ``[E, 2]``.
        count: number of images N.
        size: height and width of an image.

    Returns:
        Coverage, 0 to :data:`FULL`, int32 ``[N, size, size]``.

    Example:
        >>> square = np.array([[1.0, 1.0], [3.0, 1.0], [3.0, 2.5], [1.0, 2.5]])
        >>> image = np.zeros(4, dtype=np.int64)
        >>> (coverage(image, square, np.roll(square, -1, 0), count=1, size=4)[0] / FULL).tolist()
        [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    lines = size * LINES
    first, last = (np.rint(points * UNITS).astype(np.int64) for points in (start, end))
    x0, y0, x1, y1 = first[:, 0], first[:, 1], last[:, 0], last[:, 1]
    # Lines lie at _SPACING * k + _SPACING / 2; an edge meets those in [top, bottom).
    top = -((_SPACING // 2 - np.minimum(y0, y1)) // _SPACING)
    bottom = -((_SPACING // 2 - np.maximum(y0, y1)) // _SPACING)
    top, bottom = np.clip(top, 0, lines), np.clip(bottom, 0, lines)
    met = bottom - top
    edge = np.repeat(np.arange(len(met)), met)
    line = np.arange(len(edge)) - np.repeat(np.cumsum(met) - met, met) + top[edge]
    y = _SPACING * line + _SPACING // 2
    rise = np.where(y1 == y0, 1, y1 - y0)
    x = x0[edge] + (y - y0[edge]) * (x1 - x0)[edge] // rise[edge]
    x = np.clip(x, 0, size * UNITS)
    sign = np.where(y1 > y0, -1, 1)[edge]
    # Winding changes at x: pixels right of it in full, its own pixel for the rest of its width.
    pixel, inside = x // UNITS, x % UNITS
    width = size + 2
    place = (image[edge] * lines + line) * width + pixel
    change = np.bincount(place, sign * (UNITS - inside), minlength=count * lines * width)
    change += np.bincount(place + 1, sign * inside, minlength=count * lines * width)
    winding = np.cumsum(
        change.astype(np.int32).reshape(count, size, LINES, width)[..., :size], axis=-1
    )
    covered: NDArray[np.int32] = np.clip(winding, 0, UNITS).sum(axis=2, dtype=np.int32)
    return covered
