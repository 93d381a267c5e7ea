"""Random boxes of CutMix."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class PastedBox(NamedTuple):
    """A box in an image.

    Attributes:
        rows: rows of the box.
        columns: columns of the box.
    """

    rows: slice
    columns: slice

    def area(self, height: int, width: int) -> float:
        """Return the share of the pixels of an image that are in the box."""
        rows, columns = range(height)[self.rows], range(width)[self.columns]
        return len(rows) * len(columns) / (height * width)


def random_box(outside: float, size: tuple[int, int], random: np.random.Generator) -> PastedBox:
    """Sample a box whose center is uniform in the image. It is clipped at the border.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (ICCV
    2019), section 3.1, with the rounding of the authors' code.

    Args:
        outside: share of the pixels outside the box before it is clipped, in [0, 1].
        size: height and width of the image.
        random: generator.
    """
    sides = []
    for length in size:
        half = int(length * math.sqrt(1 - outside)) // 2
        center = int(random.integers(length))
        sides.append(slice(max(center - half, 0), min(center + half, length)))
    return PastedBox(*sides)
