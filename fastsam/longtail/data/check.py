"""Whether a data set is all there, and where to get it if not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastsam.longtail.data.catalog import GLYPHS, OWN, WHERE, DataOptions, load_dataset
from fastsam.longtail.data.content import content_hash
from fastsam.longtail.data.dataset import Images, LongTailData, groups_by_count
from fastsam.longtail.data.duplicates import repeated_contents, repeated_paths
from fastsam.longtail.data.files import FileImages
from fastsam.longtail.data.glyphs import SPECS, check_glyphs
from fastsam.longtail.data.listed import LISTED, ListedSet, find_list
from fastsam.longtail.data.lists import list_hash, read_list
from fastsam.longtail.data.pixels import WHITE_16
from fastsam.longtail.data.scan import Scan, scan_files
from fastsam.longtail.errors import DataError


def check_dataset(name: str, options: DataOptions, *, decode: bool = False) -> Iterator[str]:
    """Verify files, labels and counts; yield what was found, line by line.

    Args:
        name: name of the data set.
        options: as for :func:`load_dataset`.
        decode: also decode every image file, by the workers of ``options``, which takes a while.

    Raises:
        UsageError: for an unknown name.
        DataError: saying what is missing or wrong, and where the users of the set usually get it.
    """
    data = load_dataset(name, options)
    counts = data.counts
    yield f"{name}: {data.num_classes} classes, {counts.min()} to {counts.max()} training images"
    for part, images in data.splits.items():
        yield f"{part}: {len(images)} images"
    if name in LISTED:
        yield from _lists(LISTED[name], options.root)
    if name in GLYPHS:
        yield from check_glyphs(SPECS[data.num_classes])
    for rule, groups in (("data set's", data.groups), (">100/20-100/<20", groups_by_count(counts))):
        sizes = ", ".join(f"{group} {len(labels)}" for group, labels in groups.items())
        yield f"classes by the {rule} rule: {sizes}"
    yield from data.notes
    yield f"training set, SHA-256: {data.subset_hash}"
    for part, digest in data.contents(progress=options.progress).items():
        if part != "classes":
            yield f"{part}, SHA-256 of sizes and sampled bytes: {digest}"
    faults = _repeated(data, progress=options.progress)
    yield from faults
    yield from _decoded(data, decode=decode, progress=options.progress)
    if faults and name in OWN:
        raise DataError(f"{len(faults)} faults of repeated images, the first is {faults[0]}")


def _repeated(data: LongTailData, *, progress: bool) -> list[str]:
    """Images that occur more than once, by path and by content."""
    lists = {
        part: images.images
        for part, images in data.splits.items()
        if isinstance(images, FileImages)
    }
    return repeated_paths(lists) + repeated_contents(data.splits, progress=progress)


def _decoded(data: LongTailData, *, decode: bool, progress: bool) -> Iterator[str]:
    """What decoding finds: of every file, or else of some of them."""
    broken: list[str] = []
    largest: list[float] = []
    for part, images in data.splits.items():
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
                f"{part}: {len(several)} files have several frames, of which the first is read: "
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
            f"warning: the largest value of the images of 16 bits is {max(largest):g}, far below "
            f"{WHITE_16}, which is white: they are nearly black; name their range with --value-range "
            f"0 {max(largest):g}"
        )
    if not decode:
        return
    for path in broken:
        yield f"cannot be decoded: {path}"
    if broken:
        raise DataError(
            f"{len(broken)} images cannot be decoded, the first is {broken[0]}; fetch them "
            f"again. Where to get {data.name}: {WHERE[data.name]}"
        )
    yield "every image can be decoded"


_NAMED = 10
"""Files that one line names."""
_SAMPLED = 64
"""Files of each split that are decoded without ``--decode``, for their values and frames."""


def _sampled(images: Images) -> tuple[Sequence[int], Scan]:
    """A scan of files from all over a set, and their places in it."""
    places = np.unique(np.linspace(0, len(images) - 1, _SAMPLED).astype(np.int64)).tolist()
    if not isinstance(images, FileImages):
        return places, Scan()
    paths = [images.root / images.images.paths[place] for place in places]
    return places, scan_files(paths, images.reading)


def _lists(info: ListedSet, root: Path) -> Iterator[str]:
    """Hash of every list of a published set, compared where the published one is known."""
    for name in info.totals:
        found = list_hash(read_list(find_list(root, name)))
        known = info.hashes.get(name)
        if known is None:
            verdict = "no published hash is known"
        elif known == found:
            verdict = "the published list"
        else:
            verdict = f"NOT the published list, {known}: the order or the files differ"
        yield f"{name}, SHA-256: {found} ({verdict})"
