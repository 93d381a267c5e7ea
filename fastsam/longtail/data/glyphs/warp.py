"""Bending of outlines: smooth warp, turn, shear, perspective; sums and products only.

Elementwise sums, products, quotients and square roots are exact to the last bit in IEEE
arithmetic; sines, exponentials and matrix products are not the same everywhere, so there are none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.glyphs.draws import Draws
from fastsam.longtail.data.glyphs.shapes import Shapes

NEAREST = 0.3
"""Nothing comes nearer than this share of its distance, however strong the perspective."""

Column = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bend:
    """The deformation of N shapes.

    Attributes:
        lattice: shifts of a 4x4 lattice over the shape, float64 ``[N, 2, 4, 4]``.
        turn: tangent of half the angle of rotation, float64 ``[N]``.
        shear: by how much x moves with y, float64 ``[N]``.
        stretch: factor on x, float64 ``[N]``.
        vanish: perspective along x and y, float64 ``[N, 2]``.
    """

    lattice: NDArray[np.float64]
    turn: Column
    shear: Column
    stretch: Column
    vanish: NDArray[np.float64]


def draw_bend(draws: Draws, *, warp: float, turn: float) -> Bend:
    """A random deformation for every key.

    Args:
        draws: source of random numbers.
        warp: largest shift of a lattice point, in sizes of the shape.
        turn: largest tangent of half the angle.
    """
    return Bend(
        lattice=draws.bell(warp, 32).reshape(-1, 2, 4, 4),
        turn=draws.bell(turn)[:, 0],
        shear=draws.bell(0.5)[:, 0],
        stretch=draws.uniform(0.75, 1.3)[:, 0],
        vanish=draws.bell(0.5, 2),
    )


@dataclass(frozen=True, eq=False)
class Outlines:
    """The polygons of N images, one shape each, as edges can be made of them.

    Attributes:
        image: image of each vertex, int64 ``[V]``.
        following: next vertex of the contour, int64 ``[V]``.
        x: float64 ``[V]``.
        y: float64 ``[V]``.
    """

    image: NDArray[np.int64]
    following: NDArray[np.int64]
    x: Column
    y: Column

    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Arguments of :func:`~fastsam.longtail.data.glyphs.raster.coverage`."""
        points = np.stack([self.x, self.y], axis=1)
        return self.image, points, points[self.following]


def bent(shapes: Shapes, chosen: NDArray[np.int64], bend: Bend, weight: Column) -> Outlines:
    """The chosen shapes, thickened and deformed, in sizes of the undeformed shape.

    Args:
        shapes: all shapes.
        chosen: one for each image, int64 ``[N]``.
        bend: deformation of each image.
        weight: how far every side moves out, in sizes of the shape, float64 ``[N]``.
    """
    length = shapes.length[chosen]
    image = np.repeat(np.arange(len(chosen)), length)
    first = np.cumsum(length) - length
    place = np.arange(len(image)) - first[image]
    source = shapes.start[chosen][image] + place
    following = first[image] + shapes.following[source]
    grown = shapes.vertices[source] + weight[image, None] * shapes.outward[source]
    x, y = grown[:, 0], grown[:, 1]
    across, down = _bernstein(x), _bernstein(y)
    dx, dy = np.zeros_like(x), np.zeros_like(y)
    for i in range(4):
        for j in range(4):
            product = down[i] * across[j]
            dx = dx + bend.lattice[:, 0, i, j][image] * product
            dy = dy + bend.lattice[:, 1, i, j][image] * product
    x, y = (x + dx) * bend.stretch[image], y + dy
    x = x + bend.shear[image] * y
    half = bend.turn[image]
    scale = 1.0 / (1.0 + half * half)
    cosine, sine = (1.0 - half * half) * scale, 2.0 * half * scale
    x, y = cosine * x - sine * y, sine * x + cosine * y
    slant = bend.vanish[:, 0][image] * x + bend.vanish[:, 1][image] * y
    depth = 1.0 / np.maximum(1.0 + slant, NEAREST)
    return Outlines(image, following, x * depth, y * depth)


def _bernstein(x: Column) -> tuple[Column, Column, Column, Column]:
    """The four cubic Bernstein polynomials over [-1/2, 1/2]."""
    t = x + 0.5
    s = 1.0 - t
    return s * s * s, 3.0 * (s * s * t), 3.0 * (s * t * t), t * t * t


def box(outlines: Outlines, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest x and y of each of ``count`` images, two arrays float64 ``[N, 2]``."""
    first = np.searchsorted(outlines.image, np.arange(count))
    points = (outlines.x, outlines.y)
    low = np.stack([np.minimum.reduceat(values, first) for values in points], axis=1)
    high = np.stack([np.maximum.reduceat(values, first) for values in points], axis=1)
    return low, high


def placed(outlines: Outlines, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> Outlines:
    """The outlines times ``scale`` ``[N]``, plus ``shift`` ``[N, 2]``."""
    image = outlines.image
    factor = scale[image]
    return Outlines(
        image,
        outlines.following,
        outlines.x * factor + shift[:, 0][image],
        outlines.y * factor + shift[:, 1][image],
    )
