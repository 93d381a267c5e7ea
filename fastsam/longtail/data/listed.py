"""Data sets that are given by list files or class folders.

Of the published lists, Places-LT's training list and the evaluation lists of ImageNet-LT and
iNaturalist 2018 are in the tests as they are; the training lists of the latter two are tested on made
lists with the published numbers of images and classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fastsam.longtail.data.catalog import DataSetPart, ImageFileSettings, register_dataset
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.files import FileImages, Preparation
from fastsam.longtail.data.groups import groups_by_count, groups_by_rank
from fastsam.longtail.data.lists import (
    ImageList,
    check_files,
    class_counts,
    list_hash,
    map_by_count,
    outside,
    read_list,
)
from fastsam.longtail.data.pixels import Reading
from fastsam.longtail.data.shared_recipes import CODE, IMAGENET
from fastsam.longtail.errors import DataError
from fastsam.longtail.settings import borrowed, layer

_IMAGENET = Preparation()
_INATURALIST = Preparation(mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192))


@dataclass(frozen=True)
class ListedSet:
    """A published data set made of list files.

    Attributes:
        name: name on the command line.
        num_classes: number of classes.
        train: list file of the training images.
        validation: list file for choosing hyper-parameters; None where there is none.
        test: list file of the reported result.
        totals: published number of images of each list file.
        hashes: SHA-256 of the lists that were at hand (unpacked; see :func:`list_hash`).
        largest: published training images of the largest class.
        smallest: the same of the smallest class.
        boundaries: first class of mid and of tail after sorting by count (the paper's split); None
            to split by count.
        preparation: how files become tensors.
        where: where its users get it.
    """

    name: str
    num_classes: int
    train: str
    validation: str | None
    test: str
    totals: Mapping[str, int]
    hashes: Mapping[str, str]
    largest: int
    smallest: int
    boundaries: tuple[int, int] | None
    preparation: Preparation
    where: str


LISTED = {
    "imagenet-lt": ListedSet(
        name="imagenet-lt",
        num_classes=1000,
        train="ImageNet_LT_train.txt",
        validation="ImageNet_LT_val.txt",
        test="ImageNet_LT_test.txt",
        totals={
            "ImageNet_LT_train.txt": 115_846,
            "ImageNet_LT_val.txt": 20_000,
            "ImageNet_LT_test.txt": 50_000,
        },
        hashes={
            "ImageNet_LT_val.txt": "9af7ba688acf9532ff5845a8fb14a1e97fdc4c51ac48bc72c08ea9c3f7ff142e",
            "ImageNet_LT_test.txt": "d1590191cf8a71fada7b1aaedaa2d139a2aea93ff2f1b755319d0bd8dbaa55d5",
        },
        largest=1280,
        smallest=5,
        boundaries=(390, 835),
        preparation=_IMAGENET,
        where="images: ILSVRC 2012 train and val (val sorted into class folders) from "
        "image-net.org; lists: the OpenLongTailRecognition-OLTR project",
    ),
    "places-lt": ListedSet(
        name="places-lt",
        num_classes=365,
        train="Places_LT_train.txt",
        validation="Places_LT_val.txt",
        test="Places_LT_test.txt",
        totals={
            "Places_LT_train.txt": 62_500,
            "Places_LT_val.txt": 7_300,
            "Places_LT_test.txt": 36_500,
        },
        hashes={
            "Places_LT_train.txt": "726c4871dcbf07ce2f857703bfe32e9a83ffbf52d704239f6d95c4f4f4c247f7",
        },
        largest=4980,
        smallest=5,
        boundaries=None,
        preparation=_IMAGENET,
        where="images: Places365-Standard, small (256x256), from places2.csail.mit.edu; lists: the "
        "OpenLongTailRecognition-OLTR project",
    ),
    "inaturalist18": ListedSet(
        name="inaturalist18",
        num_classes=8142,
        train="iNaturalist18_train.txt",
        validation=None,
        test="iNaturalist18_val.txt",
        totals={"iNaturalist18_train.txt": 437_513, "iNaturalist18_val.txt": 24_426},
        hashes={
            "iNaturalist18_val.txt": "efaeff65f80641b60864470e6f255aa69453406ef5717eec8c6681748f3a61f3",
        },
        largest=1000,
        smallest=2,
        boundaries=(842, 4543),
        preparation=_INATURALIST,
        where="images and JSON: the iNaturalist Competition 2018; lists: `fastsam data convert` "
        "makes them from train2018.json and val2018.json",
    ),
}


def list_forms(root: Path, name: str) -> list[Path]:
    """The files that hold a list: ``root/name`` and its compressed forms, those that there are."""
    forms = (root / f"{name}{packing}" for packing in ("", ".gz", ".xz"))
    return [path for path in forms if path.is_file()]


def find_list(root: Path, name: str) -> Path:
    """``root/name``, or its compressed form."""
    found = list_forms(root, name)
    if not found:
        raise DataError(f"no {name} (or .gz, .xz) in {root}")
    return found[0]


def load_listed(
    info: ListedSet,
    root: Path,
    *,
    size: int = 224,
    workers: int = 4,
    corrupt: str = "stop",
    progress: bool = False,
) -> LongTailData:
    """A published list data set, its classes re-numbered by falling training count.

    Args:
        info: which one.
        root: folder with the list files, and with the images under the listed paths.
        size: height and width of the network's input.
        workers: processes that read images.
        corrupt: ``stop`` or ``skip``; see :func:`assemble`.
        progress: show progress: a bar on a terminal, a line a minute elsewhere.

    Raises:
        DataError: for a list that is missing, damaged or not of the published counts, or images
            that are not there.
    """
    names = {"train": info.train, "validation": info.validation, "test": info.test}
    lists = {
        part: read_list(find_list(root, name)) for part, name in names.items() if name is not None
    }
    for part, images in lists.items():
        check_totals(info, str(names[part]), images)
    return assemble(
        info.name,
        lists,
        root,
        num_classes=info.num_classes,
        boundaries=info.boundaries,
        preparation=Preparation(size, info.preparation.mean, info.preparation.std),
        # As the published code reads them: without their orientation.
        reading=Reading(),
        workers=workers,
        corrupt=corrupt,
        progress=progress,
    )


def check_totals(info: ListedSet, name: str, images: ImageList) -> None:
    """Raise :class:`DataError` unless a list has its published number of images."""
    if len(images) != info.totals[name]:
        raise DataError(
            f"{name} lists {len(images)} images, {info.totals[name]} are published; "
            "it is another version or half downloaded"
        )
    counts = class_counts(images, info.num_classes, name)
    if name == info.train and (counts.max(), counts.min()) != (info.largest, info.smallest):
        raise DataError(
            f"the classes of {name} have {counts.min()} to {counts.max()} images, "
            f"{info.smallest} to {info.largest} are published"
        )


def assemble(
    name: str,
    lists: Mapping[str, ImageList],
    root: Path,
    *,
    num_classes: int | None,
    boundaries: tuple[int, int] | None,
    preparation: Preparation,
    reading: Reading,
    workers: int,
    corrupt: str,
    progress: bool = False,
    class_names: tuple[str, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> LongTailData:
    """Make a data set of its lists ``train``, ``test`` and perhaps ``validation``.

    Classes are re-numbered by falling training count in the lists; ``boundaries`` splits them by
    rank, None by count. Under ``corrupt="skip"`` a decode scan removes the images that cannot be
    read, so that counts, weights and priors are those of the images that are trained on.

    Raises:
        DataError: for labels or files that do not fit, or a class with no image that can be read.
    """
    counts = class_counts(lists["train"], num_classes, "the training list")
    classes = len(counts)
    for part, images in lists.items():
        class_counts(images, classes, f"the {part} list")
        check_files(images, root, f"the {part} list")
        strays = outside(images)
        if strays:
            notes += (
                f"{part}: {len(strays)} of {len(images)} listed paths lie outside {root}, the first "
                f"is {strays[0]}",
            )
    class_map = map_by_count(counts)
    old_names = class_names or tuple(str(label) for label in range(classes))
    new_names = tuple(old_names[old] for old in np.argsort(class_map))
    sets = {
        part: FileImages(root, images.relabelled(class_map), preparation, workers, corrupt, reading)
        for part, images in lists.items()
    }
    selection = list_hash(sets["train"].images, new_names)
    if corrupt == "skip":
        sets = {part: images.readable(progress=progress) for part, images in sets.items()}
        for part, found in sets.items():
            if found.left_out:
                notes += (
                    f"{part}: {len(found.left_out)} images cannot be read and are left out, the "
                    f"first is {found.left_out[0]}",
                )
    left = np.bincount(sets["train"].targets, minlength=classes)
    if (left == 0).any():
        lost = new_names[int(np.flatnonzero(left == 0)[0])]
        raise DataError(
            f"no training image of {int((left == 0).sum())} classes can be read, the first is "
            f"{lost!r}; replace the files, or remove these classes"
        )
    return LongTailData(
        name=name,
        train=sets["train"],
        validation=sets.get("validation"),
        test=sets["test"],
        class_names=new_names,
        groups=groups_by_count(left) if boundaries is None else groups_by_rank(classes, boundaries),
        subset_hash=selection,
        notes=notes,
    )


def check_lists(name: str, settings: ImageFileSettings) -> Iterator[str]:
    """Yield the hash of every list of a published set, compared where the published one is known."""
    info = LISTED[name]
    for file in info.totals:
        found = list_hash(read_list(find_list(settings.root, file)))
        known = info.hashes.get(file)
        if known is None:
            verdict = "no published hash is known"
        elif known == found:
            verdict = "the published list"
        else:
            verdict = f"NOT the published list, {known}: the order or the files differ"
        yield f"{file}, SHA-256: {found} ({verdict})"


def _load(name: str, settings: ImageFileSettings, progress: bool) -> LongTailData:
    return load_listed(
        LISTED[name],
        settings.root,
        size=settings.image_size,
        workers=settings.workers,
        corrupt=settings.corrupt,
        progress=progress,
    )


for _name, _recipe in (
    ("imagenet-lt", IMAGENET),
    ("inaturalist18", {**IMAGENET, **layer(CODE, lr=0.1)}),
    ("places-lt", borrowed(IMAGENET, "the ImageNet-LT recipe")),
):
    register_dataset(
        DataSetPart(
            name=_name,
            build=partial(_load, _name),
            summary=f"{LISTED[_name].num_classes} classes of photographs, long-tailed",
            settings=ImageFileSettings,
            where=LISTED[_name].where,
            recipe=_recipe,
            check=partial(check_lists, _name),
        )
    )
