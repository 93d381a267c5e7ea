"""A decode scan: which image files can be decoded, and what is worth knowing about the others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastsam.cache import CACHE_VARIABLE, cache_folder
from fastsam.extras import requires_extra
from fastsam.files import write_text
from fastsam.longtail.data.pixels import Reading, decode
from fastsam.longtail.data.workers import expect_lost_connections, lost_workers_named
from fastsam.progress import ProgressBar

_TOGETHER = 64
"""Files between two steps of the progress bar."""
_VERSION = 1


@dataclass(frozen=True)
class Scan:
    """What a scan found in a list of files; files are named by their places in the list.

    Attributes:
        unreadable: reason by file, of those that cannot be decoded.
        frames: number of frames by file, of those with more than one.
        largest: the largest value of all images of 16 bits; None if there are none.
    """

    unreadable: dict[int, str] = field(default_factory=dict)
    frames: dict[int, int] = field(default_factory=dict)
    largest: float | None = None


class _Decoder(Dataset[list[tuple[str | None, int, float | None]]]):
    """Runs in the workers: decodes the files between two places."""

    def __init__(self, paths: Sequence[Path], reading: Reading) -> None:
        self.paths = paths
        self.reading = reading

    def __len__(self) -> int:
        return -(-len(self.paths) // _TOGETHER)

    def __getitem__(self, number: int) -> list[tuple[str | None, int, float | None]]:
        return [self._one(path) for path in self.paths[number * _TOGETHER :][:_TOGETHER]]

    def _one(self, path: Path) -> tuple[str | None, int, float | None]:
        try:
            decoded = decode(path, self.reading, count_frames=True)
        except (OSError, ValueError) as error:
            return str(error), 1, None
        return None, decoded.frames, decoded.largest


def scan_files(
    paths: Sequence[Path], reading: Reading, *, workers: int = 0, progress: bool = False
) -> Scan:
    """Decode every file.

    Args:
        paths: the files.
        reading: how training reads them.
        workers: processes that decode; 0 decodes in this one.
        progress: show progress: a bar on a terminal, a line a minute elsewhere.
    """
    scan = Scan()
    largest: list[float] = []
    loader: DataLoader[Any] = DataLoader(
        _Decoder(paths, reading),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=expect_lost_connections,
        # Its own generator: the loader would otherwise advance the global one.
        generator=torch.Generator(),
    )
    place = 0
    bar = ProgressBar(total=len(paths), description="decoding", unit="image", enabled=progress)
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
    """Return the scan of files with this content, from the cache if it is there.

    Args:
        content: hash of the files' contents in their order.
        reading: how the files are read.
        make: scans the files.

    The cache is a file in ``scans`` below :func:`fastsam.cache.cache_folder`. A file
    there that is damaged is written again; a folder that cannot be written is a warning.
    """
    with requires_extra("longtail", "a scan of image files"):
        import PIL

    key = {
        "version": _VERSION,
        "content": content,
        "reading": list(reading),
        "pillow": PIL.__version__,
    }
    key = json.loads(json.dumps(key))
    path = cache_folder() / "scans" / f"{content}.json"
    kept = _read(path, key)
    if kept is not None:
        return kept
    scan = make()
    try:
        write_text(path, json.dumps({"key": key, "scan": asdict(scan)}))
    except OSError as error:
        warnings.warn(
            f"the decode scan cannot be kept in {path.parent} ({error}) and is done again at the "
            f"next start; name another folder in {CACHE_VARIABLE}",
            stacklevel=2,
        )
    return scan


def _read(path: Path, key: dict[str, Any]) -> Scan | None:
    """The scan in ``path``; None if there is none of this key."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["key"] != key:
            return None
        values = content["scan"]
        return Scan(
            {int(place): str(reason) for place, reason in values["unreadable"].items()},
            {int(place): int(frames) for place, frames in values["frames"].items()},
            None if values["largest"] is None else float(values["largest"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
