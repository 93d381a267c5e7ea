"""Generated images on disk, with a hash that every load verifies."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastsam.cache import CACHE_VARIABLE, cache_folder
from fastsam.files import write_atomically
from fastsam.longtail.data.glyphs.generate import OUTLINES, SPECS, GlyphSpec, generate
from fastsam.longtail.data.glyphs.scene import SIZE
from fastsam.longtail.errors import DataError

PUBLISHED = {
    SPECS[10]: "af9474648f0b8c9eaf3bb566a8a73e434cfea13c49f092d03749daf2c7347943",
    SPECS[100]: "8720450c788bc0fd3ed0fc8daf70560f136231e6291e5f6386842d0069e64a76",
}
"""SHA-256 of the pixels of the named data sets: what they are, on any machine."""


def images_hash(images: NDArray[np.uint8]) -> str:
    """SHA-256 of pixels, 64 hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()


def cached_images(
    spec: GlyphSpec, *, folder: Path | None = None, progress: bool = True
) -> NDArray[np.uint8]:
    """The images of :func:`~.generate.generate`, drawn once and read ever after.

    Args:
        spec: what is wanted.
        folder: where to keep it; None for :func:`cache_folder`.
        progress: show a progress bar while they are drawn.

    Raises:
        DataError: if the cached file is damaged, if the pixels are not those that the named data
            set has everywhere, or if the folder cannot be written.
    """
    folder = folder or cache_folder()
    counts = "-".join(str(count) for count in (spec.train, spec.validation, spec.test))
    path = folder / f"glyphs{spec.num_classes}-{counts}-seed{spec.seed}.images"
    if path.is_file():
        return _read(path, spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise _unwritable(folder, "no permission")
    images = generate(spec, progress=progress)
    digest = images_hash(images)
    _check_published(spec, digest, "the images drawn here")
    header = json.dumps(_identity(spec) | {"sha256": digest}).encode() + b"\n"

    def write(file: IO[bytes]) -> None:
        file.write(header)
        file.write(images.data)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return images


def _identity(spec: GlyphSpec) -> dict[str, Any]:
    return {"spec": asdict(spec), "outlines": OUTLINES[spec.num_classes]}


def _read(path: Path, spec: GlyphSpec) -> NDArray[np.uint8]:
    """The images in ``path``, after all that its header says has been checked."""
    advice = "delete it, and it is drawn anew"
    with path.open("rb") as file:
        try:
            header: Any = json.loads(file.readline(1 << 16))
            kept = {name: header[name] for name in ("spec", "outlines")}
            digest = header["sha256"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not a file of glyphs; {advice}") from error
        pixels = np.fromfile(file, dtype=np.uint8)
    if kept != _identity(spec):
        raise DataError(f"{path} holds other glyphs than its name says; {advice}")
    if images_hash(pixels) != digest:
        raise DataError(
            f"{path} is damaged: its SHA-256 is not the one it was written with; {advice}"
        )
    _check_published(spec, digest, str(path))
    return pixels.reshape(-1, 3, SIZE, SIZE)


def _check_published(spec: GlyphSpec, digest: str, where: str) -> None:
    expected = PUBLISHED.get(spec, digest)
    if digest != expected:
        raise DataError(
            f"{where} have SHA-256 {digest}, but glyphs{spec.num_classes}-lt has {expected} "
            "everywhere; an older version of fastsam drew them, or this machine computes otherwise: "
            "empty the cache, and report it if that does not help"
        )


def _unwritable(folder: Path, reason: object) -> DataError:
    return DataError(
        f"glyphs cannot be kept in {folder} ({reason}); name another folder in {CACHE_VARIABLE}"
    )
