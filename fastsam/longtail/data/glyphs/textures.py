"""Tileable grey textures in integers: clouds, veins, grain, stripes, weaves, bricks, cells."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.glyphs.draws import Draws, keys

SIDE = 128
"""Height and width of a texture; it repeats seamlessly."""
COUNT = 64
"""Textures in a bank."""

Grey = NDArray[np.int64]


def texture_bank(seed: int, part: int) -> NDArray[np.uint8]:
    """The textures of one part of the data, uint8 ``[COUNT, SIDE, SIDE]``.

    Banks of different parts have the same kinds, scales and directions, and nothing else in
    common: they are different regions of the same materials.

    Args:
        seed: seed of the data.
        part: number of the part.
    """
    bank = np.empty((COUNT, SIDE, SIDE), dtype=np.uint8)
    for number in range(COUNT):
        kind = Draws(keys(seed, _KIND, number))
        region = Draws(keys(seed, _REGION, part, number))
        grey = _PATTERNS[number % len(_PATTERNS)](kind, region)
        low, high = int(grey.min()), int(grey.max())
        bank[number] = (grey - low) * 255 // max(high - low, 1)
    return bank


_KIND, _REGION = 101, 102


def _noise(region: Draws, cell: int) -> Grey:
    """Random values every ``cell`` pixels, smooth in between, 0 to 255."""
    points = SIDE // cell
    lattice = region.bits(points * points).reshape(points, points).astype(np.int64) & 255
    place = np.arange(SIDE)
    here, t = place // cell, 256 * (place % cell) // cell
    after, weight = (here + 1) % points, t * t * (768 - 2 * t) >> 16
    rows = lattice[here] * (256 - weight)[:, None] + lattice[after] * weight[:, None]
    grey: Grey = rows[:, here] * (256 - weight) + rows[:, after] * weight
    return grey >> 16


def _clouds(kind: Draws, region: Draws) -> Grey:
    coarse = 8 << int(kind.below(3)[0])
    return sum((_noise(region, coarse >> octave) * (4 >> octave) for octave in range(3)), _ZERO)


def _veins(kind: Draws, region: Draws) -> Grey:
    cell = 8 << int(kind.below(2)[0])
    ridge = abs(2 * _noise(region, cell) - 255) * 2 + abs(2 * _noise(region, cell // 2) - 255)
    return np.asarray(np.minimum(ridge, 300), dtype=np.int64)


def _grain(kind: Draws, region: Draws) -> Grey:
    fine = _noise(region, 1 << int(kind.below(2)[0]))
    return fine + _noise(region, 16)


def _stripes(kind: Draws, region: Draws) -> Grey:
    period = (8, 8, 16, 4)[int(kind.below(4)[0])]
    # Whole periods fit into a side whatever the direction, so that the texture repeats.
    across, down = int(kind.below(3)[0]), int(kind.below(5)[0]) - 2
    if across == down == 0:
        across = 1
    y, x = _GRID
    bend = _noise(region, 32) * (1 + int(kind.below(3)[0])) // 32
    phase = (across * x + down * y + bend + int(region.below(period)[0])) % period
    return np.minimum(abs(2 * phase - period), period // 2) * 64 + _noise(region, 4) // 4


def _weave(kind: Draws, region: Draws) -> Grey:
    period = 4 << int(kind.below(3)[0])
    y, x = _GRID
    checks = (x // (period // 2) + y // (period // 2)) % 2
    return checks * 255 + _noise(region, 8) // 2 + _noise(region, 2) // 4


def _bricks(kind: Draws, region: Draws) -> Grey:
    high = 4 << int(kind.below(2)[0])
    wide = 2 * high
    y, x = _GRID
    row = y // high
    shifted = (x + row % 2 * high) % SIDE
    tone = region.bits(SIDE * SIDE).reshape(SIDE, SIDE).astype(np.int64) & 127
    mortar = (y % high == 0) | (shifted % wide == 0)
    return np.where(mortar, 255, tone[row, shifted // wide] + _noise(region, 2) // 8)


def _cells(kind: Draws, region: Draws) -> Grey:
    count = 24 << int(kind.below(3)[0])
    y, x = _GRID
    nearest = np.full((SIDE, SIDE), SIDE * SIDE, dtype=np.int64)
    for _ in range(count):
        dy = abs(y - int(region.below(SIDE)[0]))
        dx = abs(x - int(region.below(SIDE)[0]))
        dy, dx = np.minimum(dy, SIDE - dy), np.minimum(dx, SIDE - dx)
        nearest = np.minimum(nearest, dy * dy + dx * dx)
    return np.minimum(nearest, 2 * SIDE * SIDE // (3 * count))


def _plain(kind: Draws, region: Draws) -> Grey:
    return _noise(region, 32 << int(kind.below(2)[0]))


_ZERO = np.zeros((SIDE, SIDE), dtype=np.int64)
_GRID = np.arange(SIDE)[:, None] + _ZERO, np.arange(SIDE)[None, :] + _ZERO
_PATTERNS = (_clouds, _stripes, _veins, _weave, _grain, _cells, _plain, _bricks)
