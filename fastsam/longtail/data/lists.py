"""List files of long-tailed benchmarks: one ``path label`` per line."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import posixpath
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsam.files import write_text
from fastsam.longtail.data.pixels import SUFFIXES
from fastsam.longtail.errors import DataError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_LONGEST_LINE = 1 << 16
"""Characters of a line; the paths of no file system are longer."""
_DIGITS = 9
"""Digits of a label; a table of more classes fits into no memory."""


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
        # Editors of Windows begin a file with a byte order mark, which is no part of the first path.
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(_lines(file, path), start=1):
                if not line.strip():
                    continue
                parts = line.rsplit(maxsplit=1)
                if len(parts) != 2 or not parts[1].isdecimal() or "\0" in line:
                    raise DataError(
                        f"{path}, line {number}: expected `path label`, got {line.strip()[:80]!r}"
                    )
                if len(parts[1]) > _DIGITS and int(parts[1][:-_DIGITS]) > 0:
                    raise DataError(
                        f"{path}, line {number}: label {parts[1][:40]} is too large; number the "
                        "classes from 0 without gaps"
                    )
                paths.append(parts[0].strip())
                labels.append(int(parts[1]))
    except (EOFError, OSError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or half downloaded: {error}") from error
    if not paths:
        raise DataError(f"{path} lists no image")
    return ImageList(paths, np.array(labels, dtype=np.int64))


def _lines(file: Any, path: Path) -> Iterator[str]:
    """The lines of a text file, of which none is read without bound."""
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE and not line.endswith("\n"):
            raise DataError(
                f"{path}, line {number}: longer than {_LONGEST_LINE} characters; expected lines "
                "`path label`"
            )
        yield line


def outside(images: ImageList) -> list[str]:
    """Return the paths that are absolute or lead out of the root by ``..``."""
    normal = ((path, posixpath.normpath(path.replace(os.sep, "/"))) for path in images.paths)
    return [
        path for path, clean in normal if Path(path).is_absolute() or clean.split("/")[0] == ".."
    ]


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
    largest = int(images.targets.max(initial=-1))
    if num_classes is not None and largest >= num_classes:
        raise DataError(
            f"{where} has label {largest}, but there are {num_classes} classes "
            f"(0 to {num_classes - 1})"
        )
    # Not by a table of all labels, which one wrong label would make larger than the memory.
    found = np.unique(images.targets)
    if num_classes is None and len(found) <= largest:
        first = int(np.flatnonzero(found != np.arange(len(found)))[0])
        raise DataError(
            f"{where} has labels up to {largest} but no image of {largest + 1 - len(found)} of them, "
            f"the first is {first}; number the classes from 0 without gaps"
        )
    return np.bincount(images.targets, minlength=num_classes or 0).astype(np.int64)


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


class ClassFolders(NamedTuple):
    """What class folders hold.

    Attributes:
        images: the images, with paths relative to the folder of the class folders.
        class_names: the names of the classes.
        left_out: number of files without an image suffix, by suffix in lower case.
    """

    images: ImageList
    class_names: list[str]
    left_out: Counter[str]


def list_folder(root: Path, class_names: Sequence[str] | None = None) -> ClassFolders:
    """Find the images of ``root/CLASS/...``, classes in alphabetical order.

    Files with a suffix in :data:`fastsam.longtail.data.pixels.SUFFIXES` are images. Links to
    folders are followed. Hidden files and folders, whose names begin with a dot, are left out: they
    are not the user's images but what programs leave behind (``.ipynb_checkpoints``,
    ``._cat.jpg``).

    Args:
        root: folder with one folder per class.
        class_names: the classes to expect, each with a folder, which may be empty; None to take the
            folders' names, each with an image.

    Raises:
        DataError: if there is no such folder, a class is unknown, without a folder or, where no
            classes are expected, without an image, if there is no image at all, or if a link leads
            back to a folder that it lies in.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}; expected one folder per class in it")
    found = sorted(
        path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
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
    left_out: Counter[str] = Counter()
    for label, name in enumerate(names):
        inside = []
        for path in files_below(root / name, (os.path.realpath(root),)):
            suffix = path.suffix.lower()
            if suffix in SUFFIXES:
                inside.append(path.relative_to(root).as_posix())
            else:
                left_out[suffix or "no suffix"] += 1
        paths += sorted(inside)
        labels += [label] * len(inside)
        if not inside:
            empty.append(name)
    suffixes = ", ".join(SUFFIXES)
    others = f"; found {describe_left_out(left_out)}" if left_out else ""
    if not paths:
        raise DataError(f"no image ({suffixes}) in the class folders of {root}{others}")
    if class_names is None and empty:
        raise DataError(
            f"no image ({suffixes}) in {len(empty)} class folders of {root}, the first is "
            f"{empty[0]!r}{others}; add images or remove these folders"
        )
    return ClassFolders(ImageList(paths, np.array(labels, dtype=np.int64)), names, left_out)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Return the counts of files by suffix, the largest first.

    Example:
        >>> describe_left_out({".txt": 1, ".heic": 12})
        '13 other files: 12 .heic, 1 .txt'
    """
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    total = sum(left_out.values())
    parts = ", ".join(f"{count} {suffix}" for suffix, count in ordered)
    return f"{total} other file{'' if total == 1 else 's'}: {parts}"


def files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Return the files in and below ``folder``, sorted, hidden ones left out, links followed.

    Args:
        folder: where to look.
        above: the real paths of the folders that it lies in.

    Raises:
        DataError: a link leads back to a folder above it.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(
            f"{folder} is a link to {real}, which it lies in; remove the link, or the images in it "
            "have no end"
        )
    for name in sorted(os.listdir(folder)):  # names, which are smaller than paths
        if name.startswith("."):
            continue
        path = folder / name
        if path.is_dir():
            yield from files_below(path, (*above, real))
        else:
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
