"""Contact sheets of the images of a data set, class by class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.extras import requires_extra
from fastsam.longtail.data.dataset import Images, LongTailData
from fastsam.longtail.errors import UsageError

GAP = 2
"""White pixels between images."""
SMALLEST = 64
"""Images with fewer rows than this are enlarged by an integer factor."""


def write_sheets(
    data: LongTailData,
    folder: str | Path,
    *,
    split: str = "train",
    columns: int = 16,
    rows: int = 8,
    classes: int = 100,
) -> Iterator[Path]:
    """Write a contact sheet for each class, and an overview with one row per class, head to tail.

    A sheet shows the first images of a class without augmentation. Its name contains rank, class name and
    number of images. A class without images in the split has no sheet, and an empty row in the overview.
    Other files in the folder are not changed.

    Args:
        data: the data set.
        folder: folder for the PNG files; created if it does not exist.
        split: dataset split: ``train``, ``validation`` or ``test``.
        columns: images per row.
        rows: rows in the sheet of one class.
        classes: maximum number of classes to show; if there are more, they are chosen evenly from head to
            tail.

    Yields:
        The path of each file after it is written.

    Raises:
        UsageError: if the split is unknown or empty, or a number is below 1.
    """
    with requires_extra("longtail", "a contact sheet"):
        from PIL import Image

    if columns < 1 or rows < 1:
        raise UsageError(f"rows and columns must be at least 1, got {rows} and {columns}")
    if classes < 1:
        raise UsageError(f"classes must be at least 1, got {classes}")
    images = data.split(split)
    if not len(images):
        raise UsageError(f"the {split} split of {data.name} has no images; choose another split")
    counts = np.bincount(images.targets, minlength=data.num_classes)
    order = np.argsort(-data.counts, kind="stable")
    width = len(str(data.num_classes - 1))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    overview = []
    ranks = np.unique(np.linspace(0, len(order) - 1, classes).round().astype(np.int64))
    for rank, label in zip(ranks.tolist(), order[ranks].tolist(), strict=True):
        members = np.flatnonzero(images.targets == label)[: columns * rows]
        shown = pictures(images, members)
        overview.append(_filled(shown[:columns], columns))
        if not len(members):
            continue
        name = _file_name(data.class_names[label])
        path = folder / f"{rank:0{width}d}-{name}-{counts[label]}.png"
        Image.fromarray(tiled(shown, columns)).save(path)
        yield path
    path = folder / "overview.png"
    Image.fromarray(tiled(np.concatenate(overview), columns)).save(path, optimize=True)
    yield path


def pictures(images: Images, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Read images as pixels, without augmentation.

    Args:
        images: the images.
        indices: indices of the images to read, int64 ``[n]``.

    Returns:
        uint8 ``[n, H, W, 3]``.
    """
    if not len(indices):
        return np.empty((0, *images.frame.size, 3), np.uint8)
    batches = images.batches([indices], None, torch.device("cpu"))
    read = torch.cat([batch.inputs for batch in batches])
    raw = read * torch.tensor(images.std)[:, None, None] + torch.tensor(images.mean)[:, None, None]
    pixels = (raw * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def tiled(shown: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Arrange images ``[n, H, W, 3]`` in a grid, uint8 ``[height, width, 3]``."""
    factor = max(1, -(-SMALLEST // shown.shape[1]))
    shown = _filled(shown, -(-len(shown) // columns) * columns)
    shown = shown.repeat(factor, axis=1).repeat(factor, axis=2)
    spaced = np.pad(shown, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    _, height, width, _ = spaced.shape
    grid = spaced.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(-1, columns * width, 3)[:-GAP, :-GAP])


def _filled(shown: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Append white images until there are ``count`` images."""
    return np.pad(shown, ((0, count - len(shown)), *((0, 0),) * 3), constant_values=255)


def _file_name(class_name: str) -> str:
    """Convert the name of a class to a valid file name on every file system, at most 80 bytes long."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in class_name).strip("._")
    return kept.encode()[:80].decode(errors="ignore") or "class"
