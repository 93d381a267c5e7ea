"""Decode scans: find unreadable image files, files with several frames, and the largest 16-bit value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastsam.longtail.data.cached import cached
from fastsam.longtail.data.encoded import Encoded
from fastsam.longtail.data.pixels import Reading, decode
from fastsam.longtail.data.workers import lost_workers_named, prepare_worker
from fastsam.progress import ProgressBar

_TOGETHER = 64
"""Number of files per step of the progress bar."""


@dataclass(frozen=True)
class Scan:
    """Result of a decode scan. Files are identified by their index in the list.

    Attributes:
        unreadable: reason for each file that cannot be decoded.
        frames: number of frames of each file with more than one.
        largest: largest value of all 16-bit images; None if there are none.
    """

    unreadable: dict[int, str] = field(default_factory=dict)
    frames: dict[int, int] = field(default_factory=dict)
    largest: float | None = None


class _Decoder(Dataset[list[tuple[str | None, int, float | None]]]):
    """Decodes a group of consecutive files in the workers."""

    def __init__(self, images: Sequence[Encoded], reading: Reading) -> None:
        self.images = images
        self.reading = reading

    def __len__(self) -> int:
        return -(-len(self.images) // _TOGETHER)

    def __getitem__(self, number: int) -> list[tuple[str | None, int, float | None]]:
        return [self._one(image) for image in self.images[number * _TOGETHER :][:_TOGETHER]]

    def _one(self, image: Encoded) -> tuple[str | None, int, float | None]:
        try:
            decoded = decode(image, self.reading, count_frames=True)
        except (OSError, ValueError) as error:
            return str(error), 1, None
        return None, decoded.frames, decoded.largest


def scan_files(
    images: Sequence[Encoded], reading: Reading, *, workers: int = 0, progress: bool = False
) -> Scan:
    """Decode every file.

    Args:
        images: the files.
        reading: handling of EXIF orientation and pixel values.
        workers: number of worker processes; 0 decodes in this process.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
    """
    scan = Scan()
    largest: list[float] = []
    loader: DataLoader[Any] = DataLoader(
        _Decoder(images, reading),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=prepare_worker,
        # Without a generator the loader would advance torch's global generator.
        generator=torch.Generator(),
    )
    place = 0
    bar = ProgressBar(total=len(images), description="decoding", unit="image", enabled=progress)
    with bar, lost_workers_named():
        for part in loader:
            for reason, frames, value in part:
                if reason is not None:
                    scan.unreadable[place] = reason
                if frames > 1:
                    scan.frames[place] = frames
                if value is not None:
                    largest.append(value)
                place += 1
            bar.update(len(part))
    return Scan(scan.unreadable, scan.frames, max(largest, default=None))


def cached_scan(content: str, reading: Reading, make: Callable[[], Scan]) -> Scan:
    """Return the scan of files with a given content, from the cache if possible.

    Args:
        content: hash of the contents of the files, in order.
        reading: handling of EXIF orientation and pixel values.
        make: function that scans the files.
    """
    return cached(
        "decode scan",
        "scans",
        content,
        {"reading": list(reading)},
        make,
        to_json=asdict,
        from_json=_from_json,
    )


def _from_json(values: Any) -> Scan:
    return Scan(
        {int(place): str(reason) for place, reason in values["unreadable"].items()},
        {int(place): int(frames) for place, frames in values["frames"].items()},
        None if values["largest"] is None else float(values["largest"]),
    )
