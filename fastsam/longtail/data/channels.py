"""Number of channels of image files."""

from __future__ import annotations

from fastsam.longtail.data.cached import cached
from fastsam.longtail.data.files import FileImages
from fastsam.longtail.data.pixels import is_gray
from fastsam.longtail.errors import DataError
from fastsam.progress import ProgressBar


def found_channels(images: FileImages, *, progress: bool = False) -> int:
    """Return 1 if all images that can be read are grayscale, else 3.

    It depends on the headers of the files only, and is kept in the cache. A packed copy knows it.

    Args:
        images: the images.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        DataError: if no image can be read.
    """
    if images.pack is not None:
        return _channels(images, images.pack.stores_gray(images.images.paths))
    channels: int = cached(
        "search for grayscale images",
        "channels",
        images.content(progress=progress),
        {"left_out": list(images.left_out)},
        lambda: _channels(images, _stores_gray(images, progress=progress)),
        to_json=int,
        from_json=_from_json,
    )
    return channels


def _stores_gray(images: FileImages, *, progress: bool) -> list[bool]:
    """Return whether each image that can be read stores one channel, up to the first that does not."""
    found = []
    bar = ProgressBar(
        total=len(images), description="reading headers", unit="file", enabled=progress
    )
    with bar:
        for image in images.encoded():
            try:
                found.append(is_gray(image))
            except OSError:
                continue  # reported when the image is read
            finally:
                bar.update()
            if not found[-1]:
                break
    return found


def _channels(images: FileImages, gray: list[bool]) -> int:
    if not gray:
        raise DataError(
            f"channels 0 requires images to choose from, but none of the {len(images)} training images in "
            f"{images.root} can be read; replace the files, or pass --channels 1 or 3"
        )
    return 1 if all(gray) else 3


def _from_json(value: int) -> int:
    if value not in (1, 3):
        raise ValueError("damaged")
    return value
