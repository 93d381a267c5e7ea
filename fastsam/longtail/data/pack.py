"""Packed copies of image files: decoded, reduced and memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsam.extras import requires_extra
from fastsam.files import locked, write_text
from fastsam.longtail.data.content import file_digests
from fastsam.longtail.data.pixels import Reading, decode, is_gray
from fastsam.longtail.data.workers import lost_workers_named, prepare_worker
from fastsam.longtail.errors import DataError, LongTailError
from fastsam.progress import ProgressBar

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "fastsam-pack"
"""Name of the folder of a packed copy in the folder of the data."""
SHORT_SIDE = 256
"""Default length of the shorter side in pixels: that of the evaluation of images of 224 pixels."""
PIXELS, MANIFEST = "pixels.bin", "manifest.json"
_FORMAT, _VERSION = "fastsam-pack", 1
_TOGETHER = 16
"""Number of files that a worker reads at a time."""
_HELP = "write the packed copy again: fastsam data pack NAME --overwrite"


class FileIdentity(NamedTuple):
    """What changes if another file takes the place of a file; all 0 if there is none."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Return the identity of the file at ``path``."""
        if not path.is_file():
            return cls(0, 0, 0)
        found = path.stat()
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class Pack:
    """A packed copy of image files, an :class:`~fastsam.longtail.data.image_source.ImageSource`.

    It is a snapshot: later changes of the files do not matter.

    Attributes:
        folder: folder of the copy.
        rows: number of each image, by path.
        shapes: height and width of each image, int64 ``[N, 2]``; 0 for images that could not be read.
        digests: digest of the content of each original file.
        short_side: length of the shorter side of images that were larger, in pixels.
        gray: whether each original file stored one channel, bool ``[N]``; None if an earlier version wrote
            the copy.
        pixels_file: identity of the file of pixels that the other attributes describe.
    """

    folder: Path
    rows: dict[str, int]
    shapes: NDArray[np.int64]
    digests: list[bytes]
    short_side: int
    gray: NDArray[np.bool_] | None
    pixels_file: FileIdentity

    @classmethod
    def load(cls, folder: Path, reading: Reading) -> Pack:
        """Open a packed copy.

        Args:
            folder: folder of the copy.
            reading: handling of EXIF orientation and pixel values, which must be that of the copy.

        Raises:
            DataError: if the copy is missing, incomplete or damaged, or was written with another ``reading``.
        """
        path = folder / MANIFEST
        # Before the manifest is read: write_pack removes it before it replaces the pixels. So the manifest
        # belongs to these pixels or to later ones, which _bytes refuses.
        pixels_file = FileIdentity.of(folder / PIXELS)
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"there is no packed copy in {folder}; write it with `fastsam data pack`, or omit --packed"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path} ({error}); {_HELP}") from error
        try:
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"version {content['version']!r:.20} is not {_VERSION}")
            paths = [str(value) for value in content["paths"]]
            shapes = np.array(content["shapes"], np.int64).reshape(-1, 2)
            digests = [bytes.fromhex(value) for value in content["digests"]]
            kept, short_side = content["reading"], int(content["short_side"])
            gray = np.array(content["gray"], np.bool_) if "gray" in content else None
            lengths = {len(paths), len(set(paths)), len(shapes), len(digests)}
            lengths |= set() if gray is None else {len(gray)}
            if len(lengths) > 1 or shapes.min() < 0:
                raise ValueError("its lists do not agree")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); {_HELP}") from error
        if kept != json.loads(json.dumps(list(reading))):
            raise DataError(
                f"{folder} was packed with the settings [exif, value_range] = {kept}, but now they are "
                f"{list(reading)}; use the same settings, or {_HELP}"
            )
        rows = {path: row for row, path in enumerate(paths)}
        pack = cls(folder, rows, shapes, digests, short_side, gray, pixels_file)
        if pixels_file.size != pack.size:
            raise DataError(
                f"{folder / PIXELS} must have {pack.size} bytes, got {pixels_file.size}; {_HELP}"
            )
        return pack

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """First byte of each image and the end of the file, int64 ``[N + 1]``."""
        return np.concatenate([[0], np.cumsum(3 * self.shapes.prod(axis=1))]).astype(np.int64)

    @property
    def size(self) -> int:
        """Size of the file of pixels in bytes."""
        return int(self._starts[-1])

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        path = self.folder / PIXELS
        # Copy on write, because torch warns about arrays that are read-only. Nothing writes.
        found = np.memmap(path, np.uint8, mode="c")
        if FileIdentity.of(path) != self.pixels_file:
            # Not a DataError, which readers take for an unreadable image.
            raise LongTailError(
                f"{path} was replaced after this process had opened the copy; start the command again"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_bytes"}

    def check(self, paths: Sequence[str], where: str) -> None:
        """Raise :class:`DataError` unless the copy has all images of a list.

        Args:
            paths: paths of the images.
            where: name of the list for the message.
        """
        missing = [path for path in paths if path not in self.rows]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} images of {where} are not in {self.folder}; the first is "
                f"{missing[0]}. The list has changed: {_HELP}"
            )

    def check_size(self, needed: int) -> None:
        """Raise :class:`DataError` if images of the copy would be enlarged.

        Args:
            needed: length in pixels to which evaluation resizes the shorter side.
        """
        if needed > self.short_side:
            raise DataError(
                f"{self.folder} has images of {self.short_side} pixels, but the image size requires "
                f"{needed}; {_HELP} --short-side {needed}"
            )

    def broken(self, path: str) -> bool:
        """Return whether an image could not be read when the copy was written."""
        return not self.shapes[self.rows[path]].all()

    def stores_gray(self, paths: Sequence[str]) -> list[bool]:
        """Return whether the original file of each image stored one channel, for those that could be read.

        Args:
            paths: paths of the images.

        Raises:
            DataError: if an earlier version wrote the copy, which did not note it.
        """
        if self.gray is None:
            raise DataError(
                f"{self.folder} does not say which images are grayscale, because an earlier version wrote "
                f"it; pass --channels 1 or 3, or {_HELP}"
            )
        return [bool(self.gray[self.rows[path]]) for path in paths if not self.broken(path)]

    def array(self, path: str) -> NDArray[np.uint8]:
        """Return the pixels of an image, uint8 ``[H, W, 3]``. They are not copied.

        Raises:
            OSError: if the image could not be read when the copy was written.
        """
        row = self.rows[path]
        if self.broken(path):
            raise OSError("the file could not be read when it was packed")
        start, end = self._starts[row : row + 2].tolist()
        return self._bytes[start:end].reshape(*self.shapes[row].tolist(), 3)

    def picture(self, path: str) -> Image:
        """See :meth:`ImageSource.picture`."""
        with requires_extra("longtail", "an image"):
            from PIL import Image

        return Image.fromarray(self.array(path))

    def pixels(self, path: str) -> Tensor:
        """See :meth:`ImageSource.pixels`."""
        return torch.from_numpy(self.array(path)).permute(2, 0, 1)


class _Reduced(NamedTuple):
    """Reduced pixels, and whether the file stores one channel."""

    pixels: NDArray[np.uint8]
    gray: bool


class _Reducer(Dataset[list["_Reduced | str"]]):
    """Decodes and reduces a group of files in the workers."""

    def __init__(self, paths: Sequence[Path], reading: Reading, short_side: int) -> None:
        self.paths = paths
        self.reading = reading
        self.short_side = short_side

    def __len__(self) -> int:
        return -(-len(self.paths) // _TOGETHER)

    def __getitem__(self, number: int) -> list[_Reduced | str]:
        return [self._one(path) for path in self.paths[number * _TOGETHER :][:_TOGETHER]]

    def _one(self, path: Path) -> _Reduced | str:
        from torchvision.transforms.v2 import functional

        try:
            image, gray = decode(path, self.reading).pixels, is_gray(path)
        except (OSError, ValueError) as error:
            return str(error)
        if isinstance(image, Tensor):
            raise DataError(
                f"{path} has more than 8 bits per channel, which a packed copy would lose; train from the "
                "files, without --packed"
            )
        if min(image.size) > self.short_side:
            image = functional.resize(image, [self.short_side])
        return _Reduced(np.array(image), gray)


def write_pack(
    root: Path,
    paths: Sequence[str],
    reading: Reading,
    *,
    short_side: int = SHORT_SIDE,
    workers: int = 0,
    skip: bool = False,
    progress: bool = False,
) -> Pack:
    """Write a packed copy of image files to the folder :data:`FOLDER` in ``root``.

    Images whose shorter side is longer than ``short_side`` are reduced to it, as in evaluation. The file of
    pixels holds the images one after the other, uint8 ``[H, W, 3]`` each. An existing copy stays readable
    until the new one is complete. If the process is killed while it replaces the files, there is no copy.

    Args:
        root: folder that the paths are relative to.
        paths: paths of the images; a path may occur more than once.
        reading: handling of EXIF orientation and pixel values.
        short_side: largest length of the shorter side, in pixels.
        workers: number of worker processes; 0 decodes in this process.
        skip: whether to note unreadable images instead of stopping.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        DataError: if an image cannot be read or has more than 8 bits per channel.
        OSError: if the copy cannot be written, or another process writes it.
    """
    with requires_extra("longtail", "a packed copy of image files"):
        import torchvision  # noqa: F401 (the workers need it)

    unique = list(dict.fromkeys(paths))
    files = [root / path for path in unique]
    loader: DataLoader[Any] = DataLoader(
        _Reducer(files, reading, short_side),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=prepare_worker,
        # Without a generator the loader would advance torch's global generator.
        generator=torch.Generator(),
    )
    folder = root / FOLDER
    with locked(folder):
        digests = file_digests(files, progress=progress)
        unfinished = {name: folder / f"{name}.part" for name in (PIXELS, MANIFEST)}
        try:
            shapes, gray = _write_pixels(
                unfinished[PIXELS], files, loader, skip=skip, progress=progress
            )
            content = {
                "format": _FORMAT,
                "version": _VERSION,
                "short_side": short_side,
                "reading": list(reading),
                "paths": unique,
                "shapes": shapes,
                "gray": gray,
                "digests": [digest.hex() for digest in digests],
            }
            write_text(unfinished[MANIFEST], json.dumps(content))
            # Without a manifest there is no copy: a kill between these lines cannot leave a manifest with the
            # pixels of another copy.
            (folder / MANIFEST).unlink(missing_ok=True)
            for name, path in unfinished.items():
                path.replace(folder / name)
        finally:
            for path in unfinished.values():
                path.unlink(missing_ok=True)
    return Pack.load(folder, reading)


def _write_pixels(
    path: Path, files: Sequence[Path], loader: DataLoader[Any], *, skip: bool, progress: bool
) -> tuple[list[tuple[int, int]], list[bool]]:
    """Write the file of pixels, and return the height and width of each image and whether it is gray."""
    shapes: list[tuple[int, int]] = []
    gray: list[bool] = []
    bar = ProgressBar(total=len(files), description="packing", unit="image", enabled=progress)
    with path.open("wb") as target, bar, lost_workers_named():
        for group in loader:
            for image in group:
                if isinstance(image, str):
                    if not skip:
                        raise DataError(
                            f"cannot read {files[len(shapes)]} ({image}); replace the file or pass "
                            "--corrupt skip"
                        )
                    shapes.append((0, 0))
                    gray.append(False)
                    continue
                target.write(image.pixels.data)
                shapes.append(image.pixels.shape[:2])
                gray.append(image.gray)
            bar.update(len(group))
        target.flush()
        os.fsync(target.fileno())
    return shapes, gray


def _unchanged(group: Any) -> Any:
    return group
