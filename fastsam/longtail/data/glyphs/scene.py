"""From random numbers to pictures: one character, its style, its surroundings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.glyphs import textures
from fastsam.longtail.data.glyphs.draws import Draws
from fastsam.longtail.data.glyphs.raster import FULL, coverage
from fastsam.longtail.data.glyphs.shapes import Shapes
from fastsam.longtail.data.glyphs.warp import bent, box, draw_bend, placed

SIZE = 32
"""Height and width of a picture."""
PIECES = 3
"""Other characters at the rim of a picture, at most."""
TREATMENTS = ("solid", "hollow", "rimmed", "shadow", "striped", "plate", "faded", "coarse")
"""How a character is filled: in one texture; as a contour; with a rim in another colour; with a
shadow; cut by stripes; on a plate; fading out to one side; at half the resolution."""

Mask = NDArray[np.int32]
Picture = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Masks:
    """Where things are, each 0 to FULL, int32 ``[N, SIZE, SIZE]``.

    Attributes:
        ink: the character.
        wide: the character and a rim around it.
        thin: the character without its rim.
        near: the character and its neighbourhood, which stays free of pieces of others.
        pieces: parts of other characters.
        centre: centre of the character, pixels, float64 ``[N, 2]``.
        extent: larger extent of the character, pixels, float64 ``[N]``.
    """

    ink: Mask
    wide: Mask
    thin: Mask
    near: Mask
    pieces: Mask
    centre: NDArray[np.float64]
    extent: NDArray[np.float64]


def draw_masks(
    draws: Draws, shapes: Shapes, chosen: NDArray[np.int64], others: NDArray[np.int64]
) -> Masks:
    """Bend and place the chosen shape of each picture, and pieces of other ones at its rim.

    The character is inside the picture with its centre and, up to its rim, all of its parts; the
    centre of every piece is outside. So there is no doubt which of them is meant.

    Args:
        draws: source of random numbers, one key for each picture.
        shapes: all shapes.
        chosen: the shape of each picture, int64 ``[N]``.
        others: shapes that pieces may come from, int64.
    """
    count = len(chosen)
    bend = draw_bend(draws, warp=0.34, turn=0.3)
    weight = draws.uniform(0.0, 0.04)[:, 0]
    extent = draws.uniform(19.0, 28.0)[:, 0]
    outlines = bent(shapes, chosen, bend, weight)
    low, high = box(outlines, count)
    scale = extent / (high - low).max(axis=1)
    room = np.maximum(SIZE / 2 - 1.0 - (high - low) * scale[:, None] * 0.5, 0.0)
    centre = SIZE / 2 + room * draws.uniform(-1.0, 1.0, 2)
    shift = centre - (low + high) * 0.5 * scale[:, None]

    def mask(extra: float) -> Mask:
        """The character with all sides moved out by so many pixels."""
        grown = bent(shapes, chosen, bend, weight + extra / extent)
        return coverage(*placed(grown, scale, shift).edges(), count=count, size=SIZE)

    pieces = np.zeros((count, SIZE, SIZE), dtype=np.int32)
    for _ in range(PIECES):
        np.maximum(pieces, _piece(draws, shapes, others, count), out=pieces)
    return Masks(mask(0.0), mask(1.2), mask(-0.8), mask(2.2), pieces, centre, extent)


def _piece(draws: Draws, shapes: Shapes, others: NDArray[np.int64], count: int) -> Mask:
    """Another character whose centre is just outside the picture."""
    chosen = others[draws.below(len(others))]
    bend = draw_bend(draws, warp=0.2, turn=0.8)
    weight = draws.uniform(0.0, 0.05)[:, 0]
    scale = draws.uniform(14.0, 26.0)[:, 0]
    along, out = draws.uniform(0.0, SIZE, 1)[:, 0], draws.uniform(0.0, 4.0)[:, 0]
    side = draws.below(4)
    across = np.where(side % 2 == 0, -out, SIZE + out)
    vertical = side < 2
    shift = np.stack([np.where(vertical, across, along), np.where(vertical, along, across)], axis=1)
    outlines = placed(bent(shapes, chosen, bend, weight), scale, shift)
    mask = coverage(*outlines.edges(), count=count, size=SIZE)
    return np.where(draws.chance(0.75)[:, None, None], mask, 0).astype(np.int32)


def paint(
    draws: Draws, masks: Masks, treatment: NDArray[np.int64], bank: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The pictures, uint8 ``[N, 3, SIZE, SIZE]``.

    Args:
        draws: source of random numbers, one key for each picture.
        masks: where the character and the pieces are.
        treatment: number of one of :data:`TREATMENTS` for each picture, int64 ``[N]``.
        bank: textures, uint8 ``[T, S, S]``.
    """
    is_ = {name: (treatment == number)[:, None, None] for number, name in enumerate(TREATMENTS)}
    ground_colour = draws.uniform(20.0, 236.0, 3).astype(np.int32)
    ink_colour, rim_colour, piece_colour = (_contrasting(draws, ground_colour) for _ in range(3))
    same = draws.chance(0.5)[:, None]
    piece_colour = np.where(same, ink_colour, piece_colour)
    ground = _material(draws, ground_colour, bank, 70)
    ink = _material(draws, ink_colour, bank, 50)
    piece = _material(draws, piece_colour, bank, 50)

    picture = _over(ground, piece, masks.pieces * (FULL - masks.near) // FULL)
    plate = np.where(is_["plate"], _plate(draws, masks), 0).astype(np.int32)
    picture = _over(picture, _flat(ground_colour), plate)
    dark = np.where(is_["shadow"], _shifted(draws, masks.wide), 0) * 3 // 4
    picture = _over(picture, _flat(ground_colour // 4), dark)
    rim = np.where(is_["rimmed"], masks.wide, 0)
    picture = _over(picture, _flat(rim_colour), rim)
    # The rim's colour stands out from the ground; the ink inside must stand out from the rim.
    ink = np.where(is_["rimmed"][:, None], ink // 4 + ground * 3 // 4, ink)

    shape = np.where(is_["hollow"], masks.wide - np.minimum(masks.thin, masks.wide), masks.ink)
    shape = np.where(is_["coarse"], _coarse(masks.ink), shape)
    shape = np.where(is_["striped"], shape * _stripes(draws) // FULL, shape)
    shape = np.where(is_["faded"], shape * _ramp(draws) // FULL, shape)
    picture = _over(picture, ink, shape)
    picture = _lit(draws, picture)
    return _sensed(draws, picture)


def _contrasting(draws: Draws, ground: Picture, least: int = 100) -> Picture:
    """A colour whose brightness differs from that of ``ground`` ``[N, 3]`` by ``least``."""
    trials = draws.uniform(0.0, 256.0, 3 * 8).astype(np.int32).reshape(-1, 8, 3)
    difference = np.abs(_brightness(trials) - _brightness(ground)[:, None])
    enough = np.where(difference >= least, 256, difference)
    best = np.argmax(enough, axis=1)  # the first that is enough, or the largest difference
    return np.take_along_axis(trials, best[:, None, None], axis=1)[:, 0]


def _brightness(colour: Picture) -> NDArray[np.int32]:
    return (3 * colour[..., 0] + 6 * colour[..., 1] + colour[..., 2]) // 10


def _flat(colour: Picture) -> Picture:
    return colour[:, :, None, None]


def _over(below: Picture, above: Picture, mask: Mask) -> Picture:
    """``above`` where ``mask`` is FULL, ``below`` where it is 0."""
    return below + (above - below) * mask[:, None] // FULL


def _material(draws: Draws, colour: Picture, bank: NDArray[np.uint8], strength: int) -> Picture:
    """A window of a texture, from one colour to a similar one, int32 ``[N, 3, SIZE, SIZE]``."""
    texture = draws.below(len(bank))[:, None]
    window = np.arange(SIZE)
    rows = (draws.below(textures.SIDE)[:, None] + window) % textures.SIDE
    columns = (draws.below(textures.SIDE)[:, None] + window) % textures.SIDE
    grey = bank[texture[:, :, None], rows[:, :, None], columns[:, None, :]].astype(np.int32)
    turned = draws.chance(0.5)[:, None, None]
    grey = np.where(turned, grey.transpose(0, 2, 1), grey) - 128
    other = draws.uniform(-strength, strength, 3).astype(np.int32) * 2
    material: Picture = _flat(colour) + _flat(other) * grey[:, None] // 256
    return material


def _plate(draws: Draws, masks: Masks) -> Mask:
    """A disc or a diamond or something between under the character."""
    window = np.arange(SIZE) + 0.5
    radius = (masks.extent * 0.62 + 1.0)[:, None, None]
    y = (window[None, :, None] - masks.centre[:, 1, None, None]) / radius
    x = (window[None, None, :] - masks.centre[:, 0, None, None]) / radius
    square = np.maximum(np.abs(x), np.abs(y))
    disc = np.sqrt(x * x + y * y)
    form = np.where(draws.chance(0.5)[:, None, None], disc, square * 1.1)
    return (np.clip((1.0 - form) * radius + 0.5, 0.0, 1.0) * FULL).astype(np.int32)


def _shifted(draws: Draws, mask: Mask) -> Mask:
    """The mask moved by one or two pixels along both axes."""
    for axis in (1, 2):
        step = draws.below(len(_STEPS))[:, None, None]
        mask = np.select(
            [step == number for number in range(len(_STEPS))],
            [_moved(mask, by, axis) for by in _STEPS],
        ).astype(np.int32)
    return mask


_STEPS = (-2, -1, 1, 2)


def _moved(mask: Mask, by: int, axis: int) -> Mask:
    """The mask moved by some pixels, with nothing where it came from."""
    moved = np.roll(mask, by, axis=axis)
    emptied = slice(None, by) if by > 0 else slice(by, None)
    moved[(slice(None),) * axis + (emptied,)] = 0
    return moved


def _coarse(mask: Mask) -> Mask:
    """The mask in squares of two by two pixels."""
    half = mask.reshape(len(mask), SIZE // 2, 2, SIZE // 2, 2).sum(axis=(2, 4), dtype=np.int32)
    coarse: Mask = (half // 4).repeat(2, axis=1).repeat(2, axis=2)
    return coarse


def _stripes(draws: Draws) -> Mask:
    """Stripes, most of each open and the rest nearly closed."""
    period = 4 + draws.below(3)[:, None, None]
    y, x = np.arange(SIZE)[None, :, None], np.arange(SIZE)[None, None, :]
    direction = draws.below(4)[:, None, None]
    along = np.select([direction == 0, direction == 1, direction == 2], [x, y, x + y], x - y)
    phase = (along + draws.below(8)[:, None, None]) % period
    return np.where(phase == 0, FULL // 8, FULL).astype(np.int32)


def _ramp(draws: Draws) -> Mask:
    """From FULL on one side to three fifths of it on the other."""
    slope = draws.uniform(-1.0, 1.0, 2)
    centred = (np.arange(SIZE) - SIZE / 2 + 0.5) / SIZE
    plane = slope[:, 0, None, None] * centred[:, None] + slope[:, 1, None, None] * centred
    return (np.clip(0.8 + 0.4 * plane, 0.6, 1.0) * FULL).astype(np.int32)


def _lit(draws: Draws, picture: Picture) -> Picture:
    """Brighter on one side than on the other."""
    slope = draws.bell(0.8, 2)
    level = draws.uniform(0.75, 1.1)[:, 0, None, None]
    centred = (np.arange(SIZE) - SIZE / 2 + 0.5) / SIZE
    plane = level + (slope[:, 0, None, None] * centred[:, None] + slope[:, 1, None, None] * centred)
    light = (np.clip(plane, 0.3, 1.6) * 256).astype(np.int32)
    return picture * light[:, None] // 256


def _sensed(draws: Draws, picture: Picture) -> NDArray[np.uint8]:
    """Some pictures blurred, all with grain."""
    blurred = picture.copy()
    blurred[:, :, 1:-1] = (picture[:, :, :-2] + 2 * picture[:, :, 1:-1] + picture[:, :, 2:]) // 4
    twice = blurred.copy()
    twice[..., 1:-1] = (blurred[..., :-2] + 2 * blurred[..., 1:-1] + blurred[..., 2:]) // 4
    picture = np.where(draws.chance(0.15)[:, None, None, None], twice, picture)
    # Four values of 16 bits from each number.
    bits = draws.bits(SIZE * SIZE // 4)[:, :, None] >> (
        np.arange(4, dtype=np.uint64) * np.uint64(16)
    )
    grain = (bits & np.uint64(0xFFFF)).astype(np.int32).reshape(-1, 1, SIZE, SIZE) - 32768
    strength = draws.uniform(2.0, 10.0)[:, 0].astype(np.int32)[:, None, None, None]
    return np.clip(picture + grain * strength // 32768, 0, 255).astype(np.uint8)
