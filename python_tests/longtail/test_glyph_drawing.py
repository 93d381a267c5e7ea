"""Outlines, polygons, filling and random numbers, against independent oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastsam.longtail.data.glyphs import textures
from fastsam.longtail.data.glyphs.alphabets import ALPHABETS, HUNDRED, TEN
from fastsam.longtail.data.glyphs.draws import Draws, keys
from fastsam.longtail.data.glyphs.generate import OUTLINES, read_drawings
from fastsam.longtail.data.glyphs.outlines import (
    Face,
    Outline,
    font_folder,
    outlines_hash,
    read_outlines,
)
from fastsam.longtail.data.glyphs.raster import FULL, coverage
from fastsam.longtail.data.glyphs.shapes import Shapes, polygons
from fastsam.longtail.data.glyphs.styles import style_order, zipf
from fastsam.longtail.data.glyphs.warp import Bend, bent, box
from fastsam.longtail.errors import DataError

Points = NDArray[np.float64]
Polygons = list[Points]


def filled(contours: Polygons, size: int) -> NDArray[np.float64]:
    """Coverage of one image by several contours, 0 to 1."""
    starts = np.concatenate(contours)
    ends = np.concatenate([np.roll(contour, -1, axis=0) for contour in contours])
    image = np.zeros(len(starts), dtype=np.int64)
    return coverage(image, starts, ends, count=1, size=size)[0] / FULL


def winding(contours: Polygons, x: Points, y: Points) -> NDArray[np.int64]:
    """How often contours wind clockwise (y down) around points, by crossings of a ray to the left."""
    turns = np.zeros(np.broadcast(x, y).shape, dtype=np.int64)
    for contour in contours:
        for (x0, y0), (x1, y1) in zip(contour, np.roll(contour, -1, axis=0), strict=True):
            if y0 == y1:
                continue
            meets = (np.minimum(y0, y1) <= y) & (y < np.maximum(y0, y1))
            left = x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
            turns += np.where(meets & left, 1 if y1 < y0 else -1, 0)
    return turns


def random_polygon(rng: np.random.Generator, corners: int, size: float) -> Points:
    return rng.uniform(-0.3 * size, 1.3 * size, (corners, 2))


def test_random_numbers_are_those_of_splitmix64() -> None:
    # The reference sequence of seed 1234567, as published with many implementations.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    draws = Draws(np.array([1234567], dtype=np.uint64))
    assert draws.bits(2)[0].tolist() + draws.bits(3)[0].tolist() == expected


def test_draws_of_a_key_do_not_depend_on_the_others() -> None:
    together = Draws(keys(3, np.arange(50), np.arange(50) % 7))
    alone = Draws(keys(3, np.array([41]), np.array([41 % 7])))
    for name, arguments in (("uniform", (-1.0, 2.0, 5)), ("bell", (2.0, 3)), ("below", (9,))):
        both = [getattr(draws, name)(*arguments) for draws in (together, alone)]
        assert np.array_equal(both[0][41], both[1][0])


def test_draws_have_the_distributions_they_say() -> None:
    draws = Draws(keys(8, np.arange(20000)))
    uniform = draws.uniform(2.0, 6.0)
    assert uniform.min() >= 2.0
    assert uniform.max() < 6.0
    assert abs(uniform.mean() - 4.0) < 0.04
    assert np.bincount(draws.below(5), minlength=5).min() > 3700
    assert abs(draws.bell(3.0).std() - 1.0) < 0.03  # of the mean of three on (-3, 3)
    assert abs(draws.chance(0.2).mean() - 0.2) < 0.015
    pairs = Draws(keys(8, np.arange(300), 1)).bits(20), Draws(keys(8, np.arange(300), 2)).bits(20)
    assert not set(pairs[0].ravel().tolist()) & set(pairs[1].ravel().tolist())


def test_styles_have_zipf_frequencies_and_classes_their_own_order() -> None:
    count, samples = 40, 60000
    ranks = np.bincount(zipf(Draws(keys(1, np.arange(samples))), count), minlength=count)
    weights = 1 / np.arange(1, count + 1)
    expected = samples * weights / weights.sum()
    assert (((ranks - expected) ** 2 / expected).sum()) < 80  # chi-square, 39 degrees of freedom
    orders = [style_order(0, label, count) for label in range(10)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len({tuple(order) for order in orders}) == 10


@pytest.mark.parametrize("seed", range(4))
def test_filling_agrees_with_winding_numbers(seed: int) -> None:
    size, fine = 9, 32
    rng = np.random.default_rng(seed)
    contours = [random_polygon(rng, int(rng.integers(3, 9)), size) for _ in range(3)]
    # Sample points that lie on none of the raster's own lines.
    at = (np.arange(size * fine) + 0.5) / fine
    inside = winding(contours, at[None, :], at[:, None]) > 0
    expected = inside.reshape(size, fine, size, fine).mean(axis=(1, 3))
    found = filled(contours, size)
    assert np.abs(found - expected).mean() < 0.02
    assert np.abs(found - expected).max() < 0.26
    assert np.abs(found.sum() - expected.sum()) < 0.02 * size * size


def test_upright_edges_are_exact_and_holes_are_holes() -> None:
    ring = [
        np.array([[1.25, 1.0], [6.75, 1.0], [6.75, 7.0], [1.25, 7.0]]),
        np.array([[3.0, 3.0], [3.0, 5.0], [5.0, 5.0], [5.0, 3.0]]),
    ]
    expected = np.zeros((8, 8))
    expected[1:7, 1:7] = 1.0
    expected[1:7, 1] = expected[1:7, 6] = 0.75
    expected[3:5, 3:5] = 0.0
    assert np.array_equal(filled(ring, 8), expected)
    # A contour that runs the other way, like a stroke thinned to less than nothing, has no ink.
    assert not filled([ring[0][::-1]], 8).any()
    # Overlap counts once; what sticks out of the image is cut off.
    assert filled([ring[0], ring[0]], 8).max() == 1.0
    assert np.array_equal(filled([ring[0] * 100 - 300], 8), np.ones((8, 8)))


def test_filling_does_not_depend_on_the_order_of_edges_nor_on_other_images() -> None:
    rng = np.random.default_rng(7)
    contours = [random_polygon(rng, 6, 12) for _ in range(5)]
    image = np.repeat(np.arange(5), 6)
    start = np.concatenate(contours)
    end = np.concatenate([np.roll(contour, -1, axis=0) for contour in contours])
    together = coverage(image, start, end, count=5, size=12)
    shuffled = rng.permutation(30)
    assert np.array_equal(
        together, coverage(image[shuffled], start[shuffled], end[shuffled], count=5, size=12)
    )
    for number, contour in enumerate(contours):
        assert np.array_equal(together[number] / FULL, filled([contour], 12))


@pytest.mark.parametrize("name", ["DejaVuSans", "DejaVuSerif-BoldItalic", "STIXGeneral", "cmss10"])
def test_outlines_are_those_of_freetype_without_scale_and_hints(name: str) -> None:
    from matplotlib import ft2font

    if hasattr(ft2font, "LoadFlags"):
        flags = ft2font.LoadFlags.NO_SCALE | ft2font.LoadFlags.NO_HINTING
    else:
        flags = ft2font.LOAD_NO_SCALE | ft2font.LOAD_NO_HINTING
    font = ft2font.FT2Font(str(font_folder() / f"{name}.ttf"))
    for outline, character in zip(
        read_outlines(Face(name, f"{name}.ttf"), "QRG8", font_folder()), "QRG8", strict=True
    ):
        font.load_char(ord(character), flags)
        vertices, codes = font.get_path()
        # FreeType moves some glyphs sideways to where their metrics want them, and adds implied
        # points; code 79 closes a contour and is no point.
        theirs = (vertices[codes != 79] * 64).round().astype(int)
        ours = outline.points + (theirs.min(axis=0) - outline.points.min(axis=0)) * [1, 0]
        assert {tuple(point) for point in ours.tolist()} <= {tuple(p) for p in theirs.tolist()}
        assert len(outline.ends) == (codes == 1).sum()


def test_a_character_map_is_no_proof_of_a_drawing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not draw 'Ж'"):
        read_outlines(Face("cmr10", "cmr10.ttf"), "Ж", font_folder())
    with pytest.raises(DataError, match="does not draw ' '"):
        read_outlines(Face("DejaVuSans", "DejaVuSans.ttf"), " ", font_folder())
    with pytest.raises(DataError, match="missing or damaged"):
        read_outlines(Face("none", "none.ttf"), "A", tmp_path)
    (tmp_path / "none.ttf").write_bytes(b"not a font")
    with pytest.raises(DataError, match="missing or damaged"):
        read_outlines(Face("none", "none.ttf"), "A", tmp_path)


def test_other_fonts_are_noticed(tmp_path: Path) -> None:
    for face in (*TEN.faces, *TEN.unseen):
        # Every face is there, but two of them are exchanged.
        name = {"cmr10.ttf": "cmb10.ttf"}.get(face.file, face.file)
        (tmp_path / face.file).write_bytes((font_folder() / name).read_bytes())
    with pytest.raises(DataError, match="draw other outlines"):
        read_drawings(10, tmp_path)


def shape(*contours: list[tuple[int, int, bool]]) -> Outline:
    points = np.array([point[:2] for contour in contours for point in contour], dtype=np.int64)
    on = np.array([point[2] for contour in contours for point in contour])
    return Outline(points, on, np.cumsum([len(contour) for contour in contours]) - 1)


def parts(shapes: Shapes, number: int) -> tuple[Polygons, Polygons]:
    """Contours of one shape, and their outward vectors."""
    first, length = shapes.start[number], shapes.length[number]
    following = shapes.following[first : first + length]
    contours, outward, left = [], [], set(range(length))
    while left:
        walk = [min(left)]
        while (after := int(following[walk[-1]])) != walk[0]:
            walk.append(after)
        left -= set(walk)
        contours.append(shapes.vertices[first + np.array(walk)])
        outward.append(shapes.outward[first + np.array(walk)])
    return contours, outward


def area(contours: Polygons) -> float:
    return sum(
        float(np.sum(c[:, 0] * np.roll(c[:, 1], -1) - c[:, 1] * np.roll(c[:, 0], -1))) / 2
        for c in contours
    )


def test_curves_are_followed_and_straight_sides_divided() -> None:
    # All four points off the curve: implied ones lie half-way. Exact area: four parabolas.
    outline = shape([(0, 0, False), (800, 0, False), (800, 800, False), (0, 800, False)])
    contours, _ = parts(polygons([outline]), 0)
    (contour,) = contours
    assert np.abs(contour).max() == 0.5
    t = np.arange(4) / 4
    start, control, end = np.array([400, 0]), np.array([800, 0]), np.array([800, 400])
    on_curve = (
        np.outer((1 - t) ** 2, start) + np.outer(2 * t * (1 - t), control) + np.outer(t**2, end)
    )
    expected = {tuple(point) for point in ((on_curve - 400) / 800 * [1, -1]).tolist()}
    assert expected <= {tuple(point) for point in contour.tolist()}
    square = shape([(0, 0, True), (600, 0, True), (600, 600, True), (0, 600, True)])
    (sides,), _ = parts(polygons([square]), 0)
    assert np.abs(sides - np.roll(sides, 1, axis=0)).max() <= 0.15
    assert abs(area([sides])) == pytest.approx(1.0)


@pytest.mark.parametrize("turn", [1, -1])
def test_weight_grows_ink_whichever_way_contours_run(turn: int) -> None:
    outer = [(0, 0, True), (1000, 0, True), (1000, 1000, True), (0, 1000, True)]
    hole = [(300, 300, True), (300, 700, True), (700, 700, True), (700, 300, True)]
    contours, outward = parts(polygons([shape(outer[::turn], hole[::turn])]), 0)
    assert area(contours) == pytest.approx(1.0 - 0.16)
    for weight in (0.05, -0.05):
        grown = [c + weight * o for c, o in zip(contours, outward, strict=True)]
        assert area(grown) == pytest.approx((1 + 2 * weight) ** 2 - (0.4 - 2 * weight) ** 2)
    # Ink is what the raster fills.
    assert filled([contour * 16 + 10 for contour in contours], 20).sum() == pytest.approx(
        0.84 * 256, rel=0.01
    )


def straight(count: int, **changes: Any) -> Bend:
    plain = {
        "lattice": np.zeros((count, 2, 4, 4)),
        "turn": np.zeros(count),
        "shear": np.zeros(count),
        "stretch": np.ones(count),
        "vanish": np.zeros((count, 2)),
    }
    return Bend(**(plain | changes))


def test_bending() -> None:
    drawings = read_drawings(10)
    chosen, nothing = np.array([3, 3, 77, 3]), np.zeros(4)
    plain = bent(drawings.shapes, chosen, straight(4), nothing)
    first = drawings.shapes.start[77]
    (members,) = np.nonzero(plain.image == 2)
    assert np.array_equal(plain.x[members], drawings.shapes.vertices[first:][: len(members), 0])
    # A lattice moved as a whole moves the shape; a quarter turn exchanges the axes.
    moved = np.zeros((4, 2, 4, 4))
    moved[:, 1] = 0.25
    shifted = bent(drawings.shapes, chosen, straight(4, lattice=moved), nothing)
    assert np.abs(shifted.x - plain.x).max() < 1e-12
    assert np.abs(shifted.y - plain.y - 0.25).max() < 1e-12
    turned = bent(drawings.shapes, chosen, straight(4, turn=np.ones(4)), nothing)
    assert np.abs(turned.x + plain.y).max() < 1e-12
    assert np.abs(turned.y - plain.x).max() < 1e-12
    near = bent(drawings.shapes, chosen, straight(4, vanish=np.full((4, 2), 0.5)), nothing)
    assert np.abs(near.x - plain.x / (1 + 0.5 * (plain.x + plain.y))).max() < 1e-12
    low, high = box(plain, 4)
    assert np.abs((high - low).max(axis=1) - 1).max() < 1e-12
    _, start, end = plain.edges()
    assert np.array_equal(np.sort(start, axis=0), np.sort(end, axis=0))


def test_banks_of_textures_share_kinds_and_nothing_else() -> None:
    train, test = textures.texture_bank(0, 0), textures.texture_bank(0, 2)
    assert train.shape == (textures.COUNT, textures.SIDE, textures.SIDE)
    assert np.array_equal(train, textures.texture_bank(0, 0))
    assert (train.min(axis=(1, 2)) == 0).all()
    assert (train.max(axis=(1, 2)) == 255).all()
    for one, other in zip(train, test, strict=True):
        assert (one != other).mean() > 0.1


SIDE = 24


def blurred_drawings(
    characters: str, faces: tuple[Face, ...], *, stretch: float
) -> NDArray[np.float32]:
    """Every drawing, stretched, fitted into a square, blurred, of norm 1: ``[F, C, S, S]``."""
    result = []
    for face in faces:
        shapes = polygons(read_outlines(face, characters, font_folder()))
        image = np.repeat(np.arange(len(characters)), shapes.length)
        points = shapes.vertices * np.array([stretch, 1.0])
        low = np.minimum.reduceat(points, shapes.start)
        high = np.maximum.reduceat(points, shapes.start)
        points = (points - ((low + high) / 2)[image]) / (high - low).max(axis=1)[image, None]
        points = points * (SIDE - 4) + SIDE / 2
        after = points[shapes.start[image] + shapes.following]
        ink = coverage(image, points, after, count=len(characters), size=SIDE) / FULL
        assert (ink.mean(axis=(1, 2)) > 0.01).all(), f"{face.name} leaves a character blank"
        for axis in (1, 2):
            ink = sum(
                weight / 9 * np.roll(ink, shift, axis)
                for shift, weight in zip(range(-2, 3), (1, 2, 3, 2, 1), strict=True)
            )
        result.append(ink / np.sqrt((ink**2).sum(axis=(1, 2), keepdims=True)))
    return np.stack(result).astype(np.float32)


def likeness(characters: str, faces: tuple[Face, ...]) -> NDArray[np.float32]:
    """The largest cosine of two characters in any two faces, also stretched or mirrored."""
    count = len(characters)
    plain = blurred_drawings(characters, faces, stretch=1.0).reshape(-1, SIDE * SIDE)
    result = np.zeros((count, count), dtype=np.float32)
    for stretch in (0.72, 1.0, 1.38):
        other = blurred_drawings(characters, faces, stretch=stretch)
        for mirrored in (other, other[..., ::-1]):
            cosines = plain @ mirrored.reshape(-1, SIDE * SIDE).T
            cosines = cosines.reshape(len(faces), count, len(faces), count).max(axis=(0, 2))
            result = np.maximum(result, cosines)
    result = np.maximum(result, result.T)
    np.fill_diagonal(result, 0)
    return result


@pytest.mark.slow
def test_no_two_of_the_hundred_are_more_alike_than_e_and_f() -> None:
    characters = HUNDRED.characters
    assert len(set(characters)) == 100
    alike = likeness(characters, (*HUNDRED.faces, *HUNDRED.unseen))
    limit = alike[characters.index("E"), characters.index("F")]
    assert alike.max() <= limit
    assert limit < 0.97
    # Each class of the tail has its look-alike at the same place of the head.
    for place in range(29):
        assert alike[place, 71 + place] > 0.94


def test_the_ten_are_told_apart_in_every_face_and_the_tail_resembles_the_head() -> None:
    assert TEN.characters == "EOCPURVFQG"
    alike = likeness(TEN.characters, (*TEN.faces, *TEN.unseen))
    assert alike.max() < 0.98
    for head, tail in ((0, 7), (1, 8), (2, 9)):
        assert alike[head, tail] > 0.93
        assert alike[:3, tail].max() > alike[3:7, tail].max()


@pytest.mark.parametrize("num_classes", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_outlines_are_the_known_ones_and_no_face_is_used_twice(num_classes: int) -> None:
    alphabet = ALPHABETS[num_classes]
    faces = (*alphabet.faces, *alphabet.unseen)
    assert len({face.name for face in faces}) == len(faces)
    drawn = [read_outlines(face, alphabet.characters, font_folder()) for face in faces]
    everything = [outline for outlines in drawn for outline in outlines]
    assert outlines_hash(everything) == OUTLINES[num_classes]
    assert len({outlines_hash(outlines) for outlines in drawn}) == len(faces)
    for outlines in drawn:
        assert len({outlines_hash([outline]) for outline in outlines}) == num_classes
