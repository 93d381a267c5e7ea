"""Whether this machine draws the glyphs that all others draw."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastsam.longtail.data.glyphs.cache import cached_images, images_hash
from fastsam.longtail.data.glyphs.generate import GlyphSpec, draw_images, read_drawings
from fastsam.longtail.data.glyphs.textures import texture_bank
from fastsam.longtail.errors import DataError

REDRAWN = 2000
"""Images of each part that are drawn again, or all if there are fewer."""


def check_glyphs(spec: GlyphSpec) -> Iterator[str]:
    """Compare fonts and cached images with what they must be; yield what was found, line by line.

    Args:
        spec: the data set.

    Raises:
        DataError: if fonts or images are others, or an image that is drawn again differs.
    """
    drawings = read_drawings(spec.num_classes)
    yield f"outlines of the fonts, SHA-256: {drawings.outlines}"
    images = cached_images(spec)
    yield f"images of all parts, SHA-256: {images_hash(images)}"
    first = redrawn = 0
    for part, size in spec.sizes().items():
        chosen = np.arange(0, size, max(1, size // REDRAWN))
        labels = spec.targets(part)[chosen]
        numbers = chosen % max(1, spec.per_class[part])
        bank = texture_bank(spec.seed, int(part))
        again = draw_images(drawings, bank, part, labels, numbers, seed=spec.seed)
        if not np.array_equal(again, images[first : first + size][chosen]):
            raise DataError(
                f"this machine draws other {part.name.lower()} images; please report it"
            )
        first += size
        redrawn += len(chosen)
    yield f"{redrawn} images drawn again: the same bits"
