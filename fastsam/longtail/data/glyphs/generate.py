"""All images of a data set, from a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.glyphs.alphabets import ALPHABETS, Alphabet
from fastsam.longtail.data.glyphs.draws import Draws, keys
from fastsam.longtail.data.glyphs.outlines import font_folder, outlines_hash, read_outlines
from fastsam.longtail.data.glyphs.scene import SIZE, TREATMENTS, draw_masks, paint
from fastsam.longtail.data.glyphs.shapes import Shapes, polygons
from fastsam.longtail.data.glyphs.styles import style_order, zipf
from fastsam.longtail.data.glyphs.textures import texture_bank
from fastsam.longtail.errors import DataError, UsageError
from fastsam.progress import ProgressBar

BATCH = 200
"""Images drawn at the same time; more do not fit into a processor's cache."""


class Part(IntEnum):
    """The parts of a data set; each has its own random numbers and its own regions of textures."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2
    UNSEEN = 3


@dataclass(frozen=True, kw_only=True)
class GlyphSpec:
    """What a set of glyphs consists of.

    Attributes:
        num_classes: 10 or 100.
        train: training images of each class.
        validation: validation images of each class.
        test: test images of each class; as many again in faces that were never trained on.
        seed: seed of everything.

    Raises:
        UsageError: for another number of classes, or a count or seed below 0.
    """

    num_classes: int
    train: int
    validation: int
    test: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_classes not in ALPHABETS:
            raise UsageError(f"glyphs have 10 or 100 classes, not {self.num_classes}")
        for name, value in asdict(self).items():
            if value < 0:
                raise UsageError(f"{name} must be at least 0, got {value}")

    @property
    def per_class(self) -> dict[Part, int]:
        """Images of each class in every part."""
        return {
            Part.TRAIN: self.train,
            Part.VALIDATION: self.validation,
            Part.TEST: self.test,
            Part.UNSEEN: self.test,
        }

    def sizes(self) -> dict[Part, int]:
        """Images of every part, in the order in which they are kept."""
        return {part: count * self.num_classes for part, count in self.per_class.items()}

    def targets(self, part: Part) -> NDArray[np.int64]:
        """Classes of the images of one part, class after class, int64."""
        return np.repeat(np.arange(self.num_classes), self.per_class[part])


SPECS = {
    10: GlyphSpec(num_classes=10, train=5000, validation=200, test=1000),
    100: GlyphSpec(num_classes=100, train=500, validation=20, test=100),
}
"""The named data sets by their number of classes: CIFAR's sizes, and a validation set."""


@dataclass(frozen=True, eq=False)
class Drawings:
    """The shapes of an alphabet: of every face in turn all characters, seen faces first.

    Attributes:
        alphabet: characters and faces.
        shapes: one for each pair of face and character.
        outlines: SHA-256 of the outlines they were made of.
    """

    alphabet: Alphabet
    shapes: Shapes
    outlines: str


OUTLINES = {
    10: "2726c07f306a0de719dfca9285c99681967f331ee1e64546bc13dbd11cc71446",
    100: "06466e9d9509bdddecb7750d7b205cbcc5270f105de72f68dffea1d65d21bfa6",
}
"""SHA-256 of the outlines of each alphabet; part of what the data are."""


@lru_cache(maxsize=len(ALPHABETS))
def read_drawings(num_classes: int, folder: Path | None = None) -> Drawings:
    """The drawings of an alphabet; kept, since reading fonts takes a second or two.

    Args:
        num_classes: 10 or 100.
        folder: where the fonts are; None for matplotlib's.

    Raises:
        DataError: if a font is missing, or its outlines are not those that the data are made of.
    """
    alphabet = ALPHABETS[num_classes]
    folder = folder or font_folder()
    outlines = [
        outline
        for face in (*alphabet.faces, *alphabet.unseen)
        for outline in read_outlines(face, alphabet.characters, folder)
    ]
    found = outlines_hash(outlines)
    if found != OUTLINES[num_classes]:
        raise DataError(
            f"the fonts in {folder} draw other outlines (SHA-256 {found}) than those that glyphs "
            f"are made of ({OUTLINES[num_classes]}); install matplotlib 3.8 to 3.11"
        )
    return Drawings(alphabet, polygons(outlines), found)


def draw_images(
    drawings: Drawings,
    bank: NDArray[np.uint8],
    part: Part,
    labels: NDArray[np.int64],
    numbers: NDArray[np.int64],
    *,
    seed: int,
) -> NDArray[np.uint8]:
    """Some images of one part; each depends on its class and number alone.

    Args:
        drawings: from :func:`read_drawings`.
        bank: textures of the part, from :func:`~.textures.texture_bank`.
        part: the part.
        labels: classes, int64 ``[N]``.
        numbers: number of each image in its class, int64 ``[N]``.
        seed: seed of the data.

    Returns:
        uint8 ``[N, 3, 32, 32]``.
    """
    alphabet = drawings.alphabet
    num_classes, seen = len(alphabet.characters), len(alphabet.faces)
    draws = Draws(keys(seed, _IMAGE, num_classes, int(part), labels, numbers))
    if part is Part.UNSEEN:
        style = draws.below(len(alphabet.unseen) * len(TREATMENTS)) + seen * len(TREATMENTS)
    else:
        count = seen * len(TREATMENTS)
        orders = np.stack([style_order(seed, label, count) for label in range(num_classes)])
        style = orders[labels, zipf(draws, count)]
    face, treatment = style // len(TREATMENTS), style % len(TREATMENTS)
    masks = draw_masks(
        draws, drawings.shapes, face * num_classes + labels, np.arange(seen * num_classes)
    )
    return paint(draws, masks, treatment, bank)


_IMAGE = 1


def generate(
    spec: GlyphSpec, *, progress: bool = True, threads: int | None = None
) -> NDArray[np.uint8]:
    """All images, part after part and class after class.

    Args:
        spec: what to generate.
        progress: show progress: a bar on a terminal, a line a minute elsewhere.
        threads: threads to draw with; None for one on every processor that may be used.

    Returns:
        uint8 ``[sum of spec.sizes(), 3, 32, 32]``; the bits depend on ``spec`` alone.

    Raises:
        DataError: if the fonts are not the right ones.
    """
    drawings = read_drawings(spec.num_classes)
    images = np.empty((sum(spec.sizes().values()), 3, SIZE, SIZE), dtype=np.uint8)
    banks = {part: texture_bank(spec.seed, int(part)) for part in Part}

    def draw(first: int, part: Part, labels: NDArray[Any], numbers: NDArray[Any]) -> int:
        images[first : first + len(labels)] = draw_images(
            drawings, banks[part], part, labels, numbers, seed=spec.seed
        )
        return len(labels)

    # Threads suffice: NumPy holds the interpreter's lock only between its loops.
    bar = ProgressBar(
        total=len(images), description=f"glyphs{spec.num_classes}", unit="image", enabled=progress
    )
    with bar, ThreadPoolExecutor(threads or usable_processors()) as pool:
        futures = {pool.submit(draw, *batch) for batch in _batches(spec)}
        try:
            while futures:
                done, futures = wait(futures, return_when=FIRST_EXCEPTION, timeout=0.5)
                for future in done:
                    bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def _batches(
    spec: GlyphSpec,
) -> Iterator[tuple[int, Part, NDArray[np.int64], NDArray[np.int64]]]:
    """Place of the first image, part, classes and numbers of every batch."""
    place = 0
    for part, count in spec.per_class.items():
        labels = spec.targets(part)
        numbers = np.tile(np.arange(count), spec.num_classes)
        for first in range(0, len(labels), BATCH):
            last = first + BATCH
            yield place + first, part, labels[first:last], numbers[first:last]
        place += len(labels)


def usable_processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
