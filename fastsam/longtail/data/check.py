"""Whether a data set is all there, and where to get it if not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastsam.longtail.data.catalog import GLYPHS, WHERE, DataOptions, load_dataset
from fastsam.longtail.data.dataset import groups_by_count
from fastsam.longtail.data.glyphs import SPECS, check_glyphs
from fastsam.longtail.data.listed import LISTED, ListedSet, find_list
from fastsam.longtail.data.lists import list_hash, read_list
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
    yield f"training set, SHA-256: {data.subset_hash}"
    if decode:
        broken = []
        for images in data.splits.values():
            broken += images.broken_files(progress=options.progress)
        for path in broken:
            yield f"cannot be decoded: {path}"
        if broken:
            raise DataError(
                f"{len(broken)} images cannot be decoded, the first is {broken[0]}; fetch them "
                f"again. Where to get {name}: {WHERE[name]}"
            )
        yield "every image can be decoded"


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
