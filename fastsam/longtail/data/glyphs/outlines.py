"""Unhinted outlines of the faces that ship with matplotlib, as integers in font units.

The points come straight from the ``glyf`` tables, so no rasteriser and no hinting takes part, and
their hash says whether two installations have the same ones. A character map is no proof of a
drawing (LastResort and some cm faces claim letters that they do not draw), so faces are named one
by one, and every drawing is compared with a hash.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.extras import requires_extra
from fastsam.longtail.errors import DataError


@dataclass(frozen=True)
class Face:
    """One way of drawing letters: a font file, or a mathematical alphabet inside one.

    Attributes:
        name: what it is called here.
        file: file under matplotlib's ``fonts/ttf``.
        capital_a: code point of its A; other capitals follow in the order of the alphabet, except
            for those in ``moved``. None for an ordinary font, where every character has its own.
        moved: code points of letters that Unicode had put elsewhere before.
    """

    name: str
    file: str
    capital_a: int | None = None
    moved: tuple[tuple[str, int], ...] = ()

    def code_point(self, character: str) -> int:
        """Where the face keeps ``character``."""
        if self.capital_a is None:
            return ord(character)
        return dict(self.moved).get(character, self.capital_a + ord(character) - ord("A"))


@dataclass(frozen=True, eq=False)
class Outline:
    """Closed contours of quadratic splines, in the form of a TrueType ``glyf`` table.

    Attributes:
        points: x to the right, y up, font units, int64 ``[P, 2]``.
        on_curve: whether the curve passes through the point, bool ``[P]``.
        ends: last point of each contour, int64 ``[contours]``.
    """

    points: NDArray[np.int64]
    on_curve: NDArray[np.bool_]
    ends: NDArray[np.int64]

    def contours(self) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Points and flags of each contour."""
        starts = [0, *(self.ends[:-1] + 1).tolist()]
        return [
            (self.points[start : end + 1], self.on_curve[start : end + 1])
            for start, end in zip(starts, self.ends.tolist(), strict=True)
        ]


def font_folder() -> Path:
    """The folder with matplotlib's TrueType files.

    Raises:
        DataError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DataError(
            "glyphs are drawn with the fonts of matplotlib: pip install 'fastsam[longtail]'"
        ) from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def read_outlines(face: Face, characters: Iterable[str], folder: Path) -> list[Outline]:
    """The drawings of ``characters`` in one face.

    Args:
        face: the face.
        characters: one character each.
        folder: where its file is; see :func:`font_folder`.

    Raises:
        DataError: if the file is missing or damaged, or has no drawing of a character.
    """
    with requires_extra("longtail", "a drawing of glyphs"):
        from fontTools.ttLib import TTFont, TTLibError

    path = folder / face.file
    try:
        with path.open("rb") as file, _without_remarks(), TTFont(file, lazy=True) as font:
            names: dict[int, str] = font.getBestCmap()
            table: Any = font["glyf"]
            return [_drawing(table, names, face, character) for character in characters]
    except (OSError, TTLibError, KeyError, AssertionError) as error:
        raise DataError(
            f"the font {path} is missing or damaged ({error!r}); install matplotlib again"
        ) from error


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keep fontTools from remarking on the dates in the cm fonts."""
    log = logging.getLogger("fontTools.ttLib.tables._h_e_a_d")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _drawing(table: Any, names: dict[int, str], face: Face, character: str) -> Outline:
    name = names.get(face.code_point(character))
    if name is None or table[name].numberOfContours == 0:
        raise DataError(f"the face {face.name} does not draw {character!r}")
    coordinates, ends, flags = table[name].getCoordinates(table)
    return Outline(
        np.array([(int(x), int(y)) for x, y in coordinates], dtype=np.int64),
        np.array([bool(flag & 1) for flag in flags]),
        np.array(ends, dtype=np.int64),
    )


def outlines_hash(outlines: Iterable[Outline]) -> str:
    """SHA-256 of the drawings in their order, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for outline in outlines:
        for part in (outline.points, outline.on_curve, outline.ends):
            values = np.ascontiguousarray(part, dtype="<i8")
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(values.tobytes())
    return digest.hexdigest()
