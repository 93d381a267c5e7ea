"""List files of long-tailed benchmarks: one ``path label`` per line."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.files import write_text
from fastsam.longtail.errors import DataError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images by path, relative to the root of their data set, and their classes.

    Attributes:
        paths: one per image.
        targets: classes, int64 ``[N]``.
    """

    paths: Sequence[str]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def relabelled(self, class_map: NDArray[np.int64]) -> ImageList:
        """The same images with class c called ``class_map[c]``."""
        return ImageList(self.paths, class_map[self.targets])


def read_list(path: Path) -> ImageList:
    """Read a list file, plain or compressed (``.gz``, ``.xz``).

    Each line is a path and a class number, separated by white space; the path may hold spaces.
    Empty lines are skipped.

    Raises:
        DataError: for a file that is missing or damaged, or a line that is not of that form, which
            is named.
    """
    if not path.is_file():
        raise DataError(f"no list file at {path}")
    opener: Any = _OPENERS.get(path.suffix, open)
    paths: list[str] = []
    labels: list[int] = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                parts = line.rsplit(maxsplit=1)
                if len(parts) != 2 or not parts[1].isdecimal():
                    raise DataError(
                        f"{path}, line {number}: expected `path label`, got {line.strip()[:80]!r}"
                    )
                paths.append(parts[0].strip())
                labels.append(int(parts[1]))
    except (EOFError, OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or half downloaded: {error}") from error
    if not paths:
        raise DataError(f"{path} lists no image")
    return ImageList(paths, np.array(labels, dtype=np.int64))


def list_hash(images: ImageList, class_names: Sequence[str] = ()) -> str:
    """SHA-256 of the lines ``path label``, whatever the file's line ends and packing.

    Args:
        images: the list.
        class_names: what its labels stand for, one name per class, where that is part of the data.

    Example:
        >>> list_hash(ImageList(["a.jpg"], np.array([0])))[:8]
        '178cc592'
    """
    digest = hashlib.sha256()
    for path, label in zip(images.paths, images.targets.tolist(), strict=True):
        digest.update(f"{path} {label}\n".encode())
    for name in class_names:
        digest.update(
            f"\n{name}\n".encode()
        )  # no list has an empty line: names cannot pass for one
    return digest.hexdigest()


def class_counts(images: ImageList, num_classes: int | None, where: str) -> NDArray[np.int64]:
    """Images of each class, int64 ``[C]``.

    Args:
        images: the list.
        num_classes: number of classes C; None for one more than the largest label, with no gaps.
        where: the list in words, for the message.

    Raises:
        DataError: for a label out of range, or, without ``num_classes``, a label that is left out.
    """
    counts = np.bincount(images.targets, minlength=num_classes or 0).astype(np.int64)
    if num_classes is not None and len(counts) > num_classes:
        raise DataError(
            f"{where} has label {len(counts) - 1}, but there are {num_classes} classes "
            f"(0 to {num_classes - 1})"
        )
    if num_classes is None and (counts == 0).any():
        gaps = np.flatnonzero(counts == 0)
        raise DataError(
            f"{where} has labels up to {len(counts) - 1} but no image of {len(gaps)} of them, the "
            f"first is {gaps[0]}; number the classes from 0 without gaps"
        )
    return counts


def map_by_count(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """New class numbers in the order of falling training counts, int64 ``[C]``.

    ``map[c]`` is the place of class c; classes with equal counts keep their order, whatever the
    version of NumPy.

    Example:
        >>> map_by_count(np.array([5, 9, 5])).tolist()
        [1, 0, 2]
    """
    order = np.argsort(-counts, kind="stable")
    class_map = np.empty_like(order)
    class_map[order] = np.arange(len(order))
    return class_map


def check_files(images: ImageList, root: Path, where: str) -> None:
    """Raise :class:`DataError` unless every listed file exists under ``root``."""
    missing = [path for path in images.paths if not (root / path).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} images of {where} are not under {root}, the first is "
            f"{missing[0]}; check --data-root and whether everything was unpacked"
        )


def list_folder(
    root: Path, class_names: Sequence[str] | None = None
) -> tuple[ImageList, list[str]]:
    """The images of ``root/CLASS/...``, classes in alphabetical order.

    Hidden files and folders, whose names begin with a dot, are left out: they are not the user's
    images but what programs leave behind (``.ipynb_checkpoints``, ``._cat.jpg``).

    Args:
        root: folder with one folder per class.
        class_names: the classes to expect, each with a folder, which may be empty; None to take the
            folders' names, each with an image.

    Returns:
        The images, with paths relative to ``root``, and the names of the classes.

    Raises:
        DataError: if there is no such folder, a class is unknown, without a folder or, where no
            classes are expected, without an image, or there is no image at all.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}; expected one folder per class in it")
    found = sorted(path.name for path in _visible(root, root.iterdir()) if path.is_dir())
    names = list(class_names) if class_names is not None else found
    strangers = sorted(set(found) - set(names))
    if strangers:
        raise DataError(f"{root} has the class {strangers[0]!r}, which the training set has not")
    missing = sorted(set(names) - set(found))
    if missing:
        raise DataError(
            f"{root} has no folder for {len(missing)} classes of the training set, the first is "
            f"{missing[0]!r}; add them, or empty ones to do without such images"
        )
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(names):
        inside = sorted(
            path.relative_to(root).as_posix()
            for path in _visible(root, (root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        )
        paths += inside
        labels += [label] * len(inside)
        if not inside:
            empty.append(name)
    suffixes = ", ".join(SUFFIXES)
    if not paths:
        raise DataError(f"no image ({suffixes}) in the class folders of {root}")
    if class_names is None and empty:
        raise DataError(
            f"no image ({suffixes}) in {len(empty)} class folders of {root}, the first is "
            f"{empty[0]!r}; add images or remove these folders"
        )
    return ImageList(paths, np.array(labels, dtype=np.int64)), names


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Files that count as images in class folders."""


def _visible(root: Path, paths: Iterable[Path]) -> Iterator[Path]:
    """Those of ``paths`` with no name below ``root`` that begins with a dot."""
    for path in paths:
        if not any(name.startswith(".") for name in path.relative_to(root).parts):
            yield path


def convert_inaturalist(source: Path, destination: Path) -> int:
    """Write the list file of an official iNaturalist JSON (``train2018.json``, ``val2018.json``).

    Categories are numbered by ascending ``id``, as in the published lists.

    Args:
        source: the JSON with ``images``, ``annotations`` and ``categories``.
        destination: the list file to write.

    Returns:
        Number of images.

    Raises:
        DataError: if the file is missing, not such a JSON, or its parts disagree.
    """
    if not source.is_file():
        raise DataError(f"no file {source}")
    try:
        content: Mapping[str, Any] = json.loads(source.read_text("utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        annotated = [(mark["image_id"], mark["category_id"]) for mark in content["annotations"]]
        categories = sorted({mark["id"] for mark in content.get("categories", ())})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is not an iNaturalist JSON with images and annotations: {error!r}"
        ) from error
    labels = {category: label for label, category in enumerate(categories)}
    lines = []
    for image, category in annotated:
        if image not in files:
            raise DataError(f"{source}: an annotation names image {image!r}, which is not listed")
        if labels and category not in labels:
            raise DataError(f"{source}: category {category!r} of image {image!r} is not listed")
        lines.append(f"{files[image]} {labels.get(category, category)}\n")
    if len(lines) != len(files):
        raise DataError(f"{source}: {len(files)} images but {len(lines)} annotations")
    write_text(destination, "".join(lines))
    return len(lines)
