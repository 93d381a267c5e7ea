"""List files, with one line ``path label`` per image, and class folders."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import posixpath
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
"""Largest number of characters in a line. Paths are shorter on every file system."""
_DIGITS = 9
"""Largest number of digits of a label. Tables of more classes would not fit into memory."""


@dataclass(frozen=True, eq=False)
class ImageList:
    """Paths of images, relative to the root of their data set, and their classes.

    Attributes:
        paths: path of each image.
        targets: classes, int64 ``[N]``.
    """

    paths: Sequence[str]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def relabeled(self, class_map: NDArray[np.int64]) -> ImageList:
        """Return the same images with label c replaced by ``class_map[c]``."""
        return ImageList(self.paths, class_map[self.targets])

    def select(self, places: NDArray[np.int64]) -> ImageList:
        """Return the images at ``places``, int64 ``[n]``."""
        return ImageList([self.paths[place] for place in places.tolist()], self.targets[places])


def read_list(path: Path) -> ImageList:
    """Read a list file, plain or compressed (``.gz``, ``.xz``).

    Each line is a path and a label, separated by white space. The path may contain spaces. Empty lines are
    skipped.

    Raises:
        DataError: if the file is missing or damaged, or a line has another form; the message names the line.
    """
    if not path.is_file():
        raise DataError(f"list file {path} does not exist")
    opener: Any = _OPENERS.get(path.suffix, open)
    paths: list[str] = []
    labels: list[int] = []
    try:
        # Windows editors start a file with a byte order mark, which utf-8-sig removes.
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(_lines(file, path), start=1):
                if not line.strip():
                    continue
                parts = line.rsplit(maxsplit=1)
                if len(parts) != 2 or not parts[1].isdecimal() or "\0" in line:
                    raise DataError(
                        f"{path}, line {number}: expected `path label`, got {line.strip()[:80]!r}"
                    )
                # Python refuses to convert thousands of digits, even if they are zeros.
                label = parts[1].lstrip("0") or "0"
                if len(label) > _DIGITS:
                    shown = label if len(label) <= 40 else f"{label[:40]}..."
                    raise DataError(
                        f"{path}, line {number}: label {shown} is too large; number the classes from 0 "
                        "without gaps"
                    )
                paths.append(parts[0].strip())
                labels.append(int(label))
    except (EOFError, OSError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or incomplete: {error}; download it again") from error
    if not paths:
        raise DataError(f"{path} lists no images; expected lines `path label`")
    return ImageList(paths, np.array(labels, dtype=np.int64))


def _lines(file: Any, path: Path) -> Iterator[str]:
    """Iterate over the lines of a text file, with a limit on their length."""
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
    """Return the paths that are absolute or leave the root by ``..``."""
    normal = ((path, posixpath.normpath(path.replace(os.sep, "/"))) for path in images.paths)
    return [
        path for path, clean in normal if Path(path).is_absolute() or clean.split("/")[0] == ".."
    ]


def list_hash(images: ImageList, class_names: Sequence[str] = ()) -> str:
    """Return the SHA-256 of the lines ``path label``, independent of line endings and compression.

    Args:
        images: the list.
        class_names: one name per class, to include in the hash; empty to hash only the list.

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
        )  # the empty line separates names from paths, because lists have none
    return digest.hexdigest()


def class_counts(images: ImageList, num_classes: int | None, where: str) -> NDArray[np.int64]:
    """Count the images of each class, int64 ``[C]``.

    Args:
        images: the list.
        num_classes: number of classes C; None to infer it from the largest label.
        where: description of the list, for the message.

    Raises:
        DataError: if a label is out of range, or ``num_classes`` is None and a label does not occur.
    """
    largest = int(images.targets.max(initial=-1))
    if num_classes is not None and largest >= num_classes:
        raise DataError(
            f"labels of {where} must be from 0 to {num_classes - 1}, got {largest}; correct the list"
        )
    # np.bincount before this check could exhaust memory because of a single wrong label.
    found = np.unique(images.targets)
    if num_classes is None and len(found) <= largest:
        first = int(np.flatnonzero(found != np.arange(len(found)))[0])
        raise DataError(
            f"{where} has labels up to {largest}, but {largest + 1 - len(found)} labels do not occur; the "
            f"first is {first}. Number the classes from 0 without gaps"
        )
    return np.bincount(images.targets, minlength=num_classes or 0).astype(np.int64)


def map_by_count(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return new labels in order of decreasing count, int64 ``[C]``.

    Entry c is the new label of class c. Classes with equal counts keep their order.

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
            f"{len(missing)} of {len(images)} images of {where} do not exist in {root}; the first is "
            f"{missing[0]}. Check --data-root, and that all archives were unpacked"
        )


class ClassFolders(NamedTuple):
    """Content of class folders.

    Attributes:
        images: the images, with paths relative to the folder that contains the class folders.
        class_names: names of the classes.
        left_out: number of files that are not images, by suffix in lower case.
    """

    images: ImageList
    class_names: list[str]
    left_out: Counter[str]


def list_folder(
    root: Path, class_names: Sequence[str] | None = None, *, ignored: Collection[str] = ()
) -> ClassFolders:
    """Find the images in class folders, ``root/CLASS/...``, with classes in alphabetical order.

    Files with a suffix in :data:`fastsam.longtail.data.pixels.SUFFIXES` are images. Links to folders are
    followed. Hidden files and folders (names that start with a dot) are ignored, because programs create them
    (``.ipynb_checkpoints``, ``._cat.jpg``).

    Args:
        root: folder with one folder per class.
        class_names: expected classes. Each must have a folder, which may be empty. None to use the names of
            the folders, each of which must contain an image.
        ignored: names of folders that do not stand for classes.

    Raises:
        DataError: if ``root`` does not exist, a class folder is unexpected, missing or (without
            ``class_names``) empty, there is no image at all, or a link leads to a folder above it.
    """
    if not root.is_dir():
        raise DataError(f"folder {root} does not exist; create it with one folder per class")
    found = sorted(
        path.name
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name not in ignored
    )
    names = list(class_names) if class_names is not None else found
    strangers = sorted(set(found) - set(names))
    if strangers:
        raise DataError(
            f"{root} has class {strangers[0]!r}, but the training set does not; add training images or "
            "remove the folder"
        )
    missing = sorted(set(names) - set(found))
    if missing:
        raise DataError(
            f"{root} has no folder for {len(missing)} classes of the training set; the first is "
            f"{missing[0]!r}. Create these folders; they may be empty"
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
        raise DataError(
            f"the class folders of {root} contain no images ({suffixes}){others}; add images"
        )
    if class_names is None and empty:
        raise DataError(
            f"{len(empty)} class folders of {root} contain no images ({suffixes}); the first is "
            f"{empty[0]!r}{others}. Add images or remove these folders"
        )
    return ClassFolders(ImageList(paths, np.array(labels, dtype=np.int64)), names, left_out)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Describe the numbers of files by suffix, largest first.

    Example:
        >>> describe_left_out({".txt": 1, ".heic": 12})
        '13 other files: 12 .heic, 1 .txt'
    """
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    total = sum(left_out.values())
    parts = ", ".join(f"{count} {suffix}" for suffix, count in ordered)
    return f"{total} other file{'' if total == 1 else 's'}: {parts}"


def files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Iterate over the files in a folder and its subfolders, sorted, without hidden files.

    Links to folders are followed.

    Args:
        folder: folder to search.
        above: resolved paths of the folders that contain it.

    Raises:
        DataError: if a link leads to a folder above it.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(
            f"{folder} is a link to a folder that contains it, {real}; remove the link, which would be "
            "followed forever"
        )
    for name in sorted(os.listdir(folder)):  # strings need less memory than paths
        if name.startswith("."):
            continue
        path = folder / name
        if path.is_dir():
            yield from files_below(path, (*above, real))
        else:
            yield path


def convert_inaturalist(source: Path, destination: Path) -> int:
    """Convert an official iNaturalist JSON (``train2018.json``, ``val2018.json``) to a list file.

    Categories are labeled in order of ascending ``id``, as in the published lists.

    Args:
        source: path of the JSON file with ``images``, ``annotations`` and ``categories``.
        destination: path of the list file to write.

    Returns:
        Number of images.

    Raises:
        DataError: if the file is missing, has another structure, or is inconsistent.
    """
    if not source.is_file():
        raise DataError(f"{source} does not exist; pass the path of train2018.json or val2018.json")
    try:
        content: Mapping[str, Any] = json.loads(source.read_text("utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        annotated = [(mark["image_id"], mark["category_id"]) for mark in content["annotations"]]
        categories = sorted({mark["id"] for mark in content.get("categories", ())})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is not an iNaturalist JSON with images and annotations: {error!r}; download it again"
        ) from error
    labels = {category: label for label, category in enumerate(categories)}
    lines = []
    for image, category in annotated:
        if image not in files:
            raise DataError(
                f"{source}: image {image!r} of an annotation is not in `images`; download it again"
            )
        if labels and category not in labels:
            raise DataError(
                f"{source}: category {category!r} of image {image!r} is not in `categories`; download it "
                "again"
            )
        lines.append(f"{files[image]} {labels.get(category, category)}\n")
    if len(lines) != len(files):
        raise DataError(
            f"{source}: expected one annotation for each of {len(files)} images, got {len(lines)}; download "
            "it again"
        )
    write_text(destination, "".join(lines))
    return len(lines)
