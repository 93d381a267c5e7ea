"""Outlines as polygons of one size, ready to be bent: vertices, and where each moves with weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.glyphs.outlines import Outline

CURVE_STEPS = 4
"""Chords of a quadratic spline; a power of two, so that its points are exact."""
LONGEST_SIDE = 0.15
"""Straight sides are halved until they are no longer than this, or a warp could not bend them."""
SHARPEST = 0.4
"""Bound on 1 + cos of the turn at a vertex, so that the miter of a spike stays short."""


@dataclass(frozen=True, eq=False)
class Shapes:
    """Polygons of S shapes, one after the other, each centred at 0 with a larger extent of 1.

    Attributes:
        vertices: x to the right, y down, float64 ``[V, 2]``.
        outward: where a vertex moves if every side moves out by one unit, float64 ``[V, 2]``.
        following: the next vertex of its contour, counted from the shape's first, int64 ``[V]``.
        start: first vertex of each shape, int64 ``[S]``.
        length: vertices of each shape, int64 ``[S]``.
    """

    vertices: NDArray[np.float64]
    outward: NDArray[np.float64]
    following: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]


def polygons(outlines: Sequence[Outline]) -> Shapes:
    """All outlines as :class:`Shapes`."""
    parts = [_polygon(outline) for outline in outlines]
    length = np.array([len(part[0]) for part in parts], dtype=np.int64)
    vertices, outward, following = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Shapes(vertices, outward, following.astype(np.int64), np.cumsum(length) - length, length)


def _polygon(
    outline: Outline,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    contours = [_chords(points, on) for points, on in outline.contours() if len(points) > 2]
    everything = np.concatenate(contours)
    low, high = everything.min(axis=0), everything.max(axis=0)
    extent = (high - low).max()
    flip = np.array([1.0, -1.0])
    contours = [_divided((c - (low + high) * 0.5) * flip / extent) for c in contours]
    # A face's contours may run either way round; here ink is on the same side in all of them.
    if sum(_area(contour) for contour in contours) < 0:
        contours = [contour[::-1] for contour in contours]
    following, first = [], 0
    for contour in contours:
        following.append(first + (np.arange(len(contour)) + 1) % len(contour))
        first += len(contour)
    outward = [_outward(contour) for contour in contours]
    return np.concatenate(contours), np.concatenate(outward), np.concatenate(following)


def _chords(points: NDArray[np.int64], on_curve: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The polygon of a contour of quadratic splines, float64 ``[n, 2]``; exact."""
    # Between two control points off the curve lies an implied one on it.
    full: list[tuple[NDArray[np.float64], bool]] = []
    for i in range(len(points)):
        here, after = points[i].astype(np.float64), points[(i + 1) % len(points)]
        full.append((here, bool(on_curve[i])))
        if not on_curve[i] and not on_curve[(i + 1) % len(points)]:
            full.append(((here + after) * 0.5, True))
    first = next(i for i, (_, on) in enumerate(full) if on)
    full = full[first:] + full[:first]
    chords = []
    for i, (point, on) in enumerate(full):
        if on:
            chords.append(point)
            continue
        before, after = full[i - 1][0], full[(i + 1) % len(full)][0]
        for step in range(1, CURVE_STEPS):
            t = step / CURVE_STEPS
            chords.append(
                before * ((1 - t) * (1 - t)) + point * (2 * t * (1 - t)) + after * (t * t)
            )
    polygon: NDArray[np.float64] = np.array(chords)
    moves: NDArray[np.bool_] = (polygon != np.roll(polygon, 1, axis=0)).any(axis=1)
    return polygon[moves]


def _divided(polygon: NDArray[np.float64]) -> NDArray[np.float64]:
    """The polygon with long sides divided into equal parts."""
    pieces = []
    for here, after in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        longest = np.abs(after - here).max()
        parts = 1
        while longest > LONGEST_SIDE * parts:
            parts *= 2
        fractions = np.arange(parts) / parts
        pieces.append(here + (after - here) * fractions[:, None])
    return np.concatenate(pieces)


def _area(polygon: NDArray[np.float64]) -> float:
    """Signed area of a polygon."""
    after = np.roll(polygon, -1, axis=0)
    return float(np.cumsum(polygon[:, 0] * after[:, 1] - polygon[:, 1] * after[:, 0])[-1]) * 0.5


def _outward(polygon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Miter vector of every vertex: by how much it moves when all sides move out by one."""
    side = np.roll(polygon, -1, axis=0) - polygon
    length = np.sqrt(side[:, 0] * side[:, 0] + side[:, 1] * side[:, 1])
    normal = np.stack([side[:, 1] / length, -side[:, 0] / length], axis=1)
    before = np.roll(normal, 1, axis=0)
    turn = 1.0 + (normal[:, 0] * before[:, 0] + normal[:, 1] * before[:, 1])
    result: NDArray[np.float64] = (normal + before) / np.maximum(turn, SHARPEST)[:, None]
    return result
