"""Checks of the files, labels and counts of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastsam.longtail.data.catalog import DATASETS, dataset_settings, load_with
from fastsam.longtail.data.content import content_hash
from fastsam.longtail.data.dataset import Images, LongTailData
from fastsam.longtail.data.duplicates import repeated_contents, repeated_paths
from fastsam.longtail.data.files import FileImages
from fastsam.longtail.data.groups import groups_by_count
from fastsam.longtail.data.pixels import WHITE_16
from fastsam.longtail.data.scan import Scan, scan_files
from fastsam.longtail.errors import DataError


def check_dataset(
    name: str, *, decode: bool = False, progress: bool = True, **values: Any
) -> Iterator[str]:
    """Check files, labels and counts of a data set, and yield the findings line by line.

    Args:
        name: name of the data set.
        decode: also decode every image file, in the data set's ``workers``. This may take minutes.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
        **values: settings of the data set; see :func:`load_dataset`.

    Raises:
        UsageError: if the name or a setting is unknown.
        DataError: if something is missing or wrong; the message says where to get the data set.
    """
    part, settings = DATASETS[name], dataset_settings(name, **values)
    data = load_with(name, settings, progress=progress)
    counts = data.counts
    yield f"{name}: {data.num_classes} classes, {counts.min()} to {counts.max()} training images"
    for split, images in data.splits.items():
        yield f"{split}: {len(images)} images"
    yield from part.check(settings)
    for rule, groups in (("data set's", data.groups), (">100/20-100/<20", groups_by_count(counts))):
        sizes = ", ".join(f"{group} {len(labels)}" for group, labels in groups.items())
        yield f"classes by the {rule} rule: {sizes}"
    yield from data.notes
    yield f"training set, SHA-256: {data.subset_hash}"
    for split, digest in data.contents(progress=progress).items():
        if split != "classes":
            files = isinstance(data.split(split), FileImages)
            covered = "sizes and sampled bytes" if files else "pixels"
            yield f"{split}, SHA-256 of {covered}: {digest}"
    faults = _repeated(data, progress=progress)
    yield from faults
    yield from _decoded(data, decode=decode, progress=progress)
    if faults and part.own:
        raise DataError(
            f"found {len(faults)} problem(s) with repeated images; the first: {faults[0]}. Remove the "
            "repeated images"
        )


def _repeated(data: LongTailData, *, progress: bool) -> list[str]:
    """Describe images that occur more than once, by path or by content."""
    lists = {
        part: images.images
        for part, images in data.splits.items()
        if isinstance(images, FileImages)
    }
    return repeated_paths(lists) + repeated_contents(data.splits, progress=progress)


def _decoded(data: LongTailData, *, decode: bool, progress: bool) -> Iterator[str]:
    """Decode all files, or a sample of them, and yield the findings."""
    broken: list[str] = []
    largest: list[float] = []
    for part, images in data.splits.items():
        if isinstance(images, FileImages):
            images = replace(images, pack=None)  # check the files themselves
        places: Sequence[int]
        if decode:
            places = range(len(images))
            scan = images.scan(progress=progress)
        else:
            places, scan = _sampled(images)
        broken += [images.name_of(places[place]) for place in scan.unreadable]
        if scan.frames:
            several = [images.name_of(places[place]) for place in scan.frames]
            yield (
                f"{part}: {len(several)} files have several frames; only the first frame is read: "
                f"{', '.join(several[:_NAMED])}{', ...' if len(several) > _NAMED else ''}"
            )
        if scan.largest is not None:
            largest.append(scan.largest)
        if decode:
            digests = images.digests(whole=True, progress=progress)
            yield f"{part}, SHA-256 of every byte: {content_hash(digests, images.targets)}"
    ranged = any(
        isinstance(images, FileImages) and images.reading.value_range is not None
        for images in data.splits.values()
    )
    if largest and max(largest) < WHITE_16 / 8 and not ranged:
        yield (
            f"warning: the largest value in 16-bit images is {max(largest):g}, far below white "
            f"({WHITE_16}), so the images are nearly black; pass --value-range 0 {max(largest):g}"
        )
    if not decode:
        return
    for path in broken:
        yield f"cannot be decoded: {path}"
    if broken:
        raise DataError(
            f"{len(broken)} images cannot be decoded; the first is {broken[0]}. Download them again. To "
            f"get {data.name}: {DATASETS[data.name].where}"
        )
    yield "all images can be decoded"


_NAMED = 10
"""Largest number of files named in one line."""
_SAMPLED = 64
"""Number of files per split that are decoded without ``--decode``, to check their values and frames."""


def _sampled(images: Images) -> tuple[Sequence[int], Scan]:
    """Scan evenly spaced files of a split, and return their indices with the result."""
    places = np.unique(np.linspace(0, len(images) - 1, _SAMPLED).astype(np.int64)).tolist()
    if not isinstance(images, FileImages):
        return places, Scan()
    return places, scan_files(images.encoded(places), images.reading)
