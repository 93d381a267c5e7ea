"""``glyphs10-lt`` and ``glyphs100-lt``: images of characters that the package draws itself.

From the bottom up: ``outlines`` reads fonts, ``shapes`` makes polygons of them, ``warp`` bends
these, ``raster`` fills them; ``textures`` and ``scene`` make pictures; ``alphabets`` and ``styles``
say of what, ``generate`` of how many; ``cache`` keeps them, ``check`` verifies
them and ``longtailed`` cuts the tail.
"""

from fastsam.longtail.data.glyphs.cache import cached_images, images_hash
from fastsam.longtail.data.glyphs.check import check_glyphs
from fastsam.longtail.data.glyphs.generate import SPECS, GlyphSpec, Part, generate
from fastsam.longtail.data.glyphs.longtailed import load_glyphs_lt

__all__ = [
    "SPECS",
    "GlyphSpec",
    "Part",
    "cached_images",
    "check_glyphs",
    "generate",
    "images_hash",
    "load_glyphs_lt",
]
