"""A folder of odd image files: 16-bit gray, CMYK, rotated by EXIF, TIFF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("bars", "blank", "checks", "dots", "rows")
COUNTS = (90, 55, 30, 18, 7)
"""200 images, long-tailed."""


def write_odd_images(root: Path, counts: tuple[int, ...] = COUNTS) -> None:
    """Write class folders whose images have one of five formats in turn."""
    rng = np.random.default_rng(0)
    for label, count in enumerate(counts):
        folder = root / CLASSES[label]
        folder.mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(20, 41, 2)
            write_odd_image(folder / f"{number:03d}", pattern(label, height, width, rng), number)


def pattern(label: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a noisy gray pattern in [0, 1], float64 ``[H, W]``."""
    row, column = np.mgrid[:height, :width] // 4 % 2
    clean = (column, np.zeros_like(row), row ^ column, row & column, row)[label]
    return np.clip(0.2 + 0.6 * clean + rng.normal(0, 0.1, (height, width)), 0, 1)


def write_odd_image(stem: Path, gray: np.ndarray, number: int) -> Path:
    """Write an image in one of five forms: 16-bit PNG, CMYK JPEG, rotated JPEG, 16-bit TIFF, palette GIF."""
    eight = Image.fromarray((gray * 255).astype(np.uint8))
    sixteen = Image.fromarray((gray * 65535).astype(np.uint16))
    kind = number % 5
    suffix = (".png", ".jpg", ".jpeg", ".tif", ".gif")[kind]
    path = stem.with_suffix(suffix)
    if kind in (0, 3):
        sixteen.save(path)
    elif kind == 1:
        eight.convert("CMYK").save(path)
    elif kind == 2:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn clockwise to show
        eight.transpose(Image.Transpose.ROTATE_90).convert("RGB").save(path, exif=exif, quality=95)
    else:
        eight.convert("P").save(path)
    return path
