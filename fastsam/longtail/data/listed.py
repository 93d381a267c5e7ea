"""Published data sets that consist of list files and images: ImageNet-LT, Places-LT, iNaturalist 2018.

The tests read the published training list of Places-LT and the published evaluation lists of ImageNet-LT and
iNaturalist 2018. The training lists of the latter two are replaced by generated lists with the published
numbers of images and classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fastsam.longtail.data.catalog import DataSetPart, ImageFileSettings, register_dataset
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.encoded import Location
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
from fastsam.longtail.data.pack import FOLDER, Pack
from fastsam.longtail.data.pixels import Reading
from fastsam.longtail.data.shared_recipes import CODE, IMAGENET, PLACES
from fastsam.longtail.errors import DataError
from fastsam.longtail.settings import layer

_IMAGENET = Preparation()
_INATURALIST = Preparation(mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192))


@dataclass(frozen=True)
class ListedSet:
    """A published data set made of list files.

    Attributes:
        name: name on the command line.
        num_classes: number of classes.
        train: list file of the training images.
        validation: list file of the validation images; None if there is none.
        test: list file of the test images.
        totals: published number of images in each list file.
        hashes: SHA-256 of the published lists that were available (uncompressed; see :func:`list_hash`).
        largest: published number of training images of the largest class.
        smallest: published number of training images of the smallest class.
        boundaries: first class of mid and of tail after sorting by count, as in the paper; None to split by
            count.
        preparation: transforms from files to tensors.
        where: where to get the files.
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
        "creates them from train2018.json and val2018.json",
    ),
}


def list_forms(root: Path, name: str) -> list[Path]:
    """Return the existing files of a list: ``root/name`` and its compressed forms."""
    forms = (root / f"{name}{packing}" for packing in ("", ".gz", ".xz"))
    return [path for path in forms if path.is_file()]


def find_list(root: Path, name: str) -> Path:
    """Return the path of a list: ``root/name`` or its compressed form.

    Raises:
        DataError: if there is neither.
    """
    found = list_forms(root, name)
    if not found:
        raise DataError(
            f"{root} contains no {name} (or .gz, .xz); add the file or pass --data-root DIR"
        )
    return found[0]


def load_listed(
    info: ListedSet,
    root: Path,
    *,
    size: int = 224,
    workers: int = 4,
    corrupt: str = "stop",
    packed: bool = False,
    progress: bool = False,
) -> LongTailData:
    """Load a published list data set. Its classes are relabeled in order of decreasing training count.

    Args:
        info: the data set.
        root: folder with the list files, and with the images under the listed paths.
        size: height and width of the network's input in pixels.
        workers: number of worker processes that read images.
        corrupt: ``stop`` or ``skip``; see :func:`assemble`.
        packed: read the packed copy in ``root`` instead of the image files.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        DataError: if a list is missing, damaged or does not have the published counts, or if images are
            missing.
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
        # The published code ignores the EXIF orientation.
        reading=Reading(),
        workers=workers,
        corrupt=corrupt,
        packed=packed,
        progress=progress,
    )


def check_totals(info: ListedSet, name: str, images: ImageList) -> None:
    """Raise :class:`DataError` unless a list has its published number of images."""
    if len(images) != info.totals[name]:
        raise DataError(
            f"{name} must list the published {info.totals[name]} images, got {len(images)}; it is another "
            "version or incomplete, download it again"
        )
    counts = class_counts(images, info.num_classes, name)
    if name == info.train and (counts.max(), counts.min()) != (info.largest, info.smallest):
        raise DataError(
            f"classes of {name} must have the published {info.smallest} to {info.largest} images, got "
            f"{counts.min()} to {counts.max()}; it is another version, download it again"
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
    packed: bool = False,
    progress: bool = False,
    class_names: tuple[str, ...] | None = None,
    notes: tuple[str, ...] = (),
    location: Location | None = None,
) -> LongTailData:
    """Create a data set from the lists ``train``, ``test`` and optionally ``validation``.

    Classes are relabeled in order of decreasing training count. ``boundaries`` splits them into groups by
    rank; None splits by count. With ``corrupt="skip"`` a decode scan removes unreadable images first, so that
    counts, weights and priors are those of the images used in training. With ``packed`` the images come from
    the packed copy in ``root`` (:mod:`fastsam.longtail.data.pack`), and their files may be missing. With
    ``location`` they are found by it instead of in ``root``.

    Raises:
        DataError: if labels are not valid, files or the packed copy are missing, or a class has no readable
            image.
    """
    counts = class_counts(lists["train"], num_classes, "the training list")
    classes = len(counts)
    pack = Pack.load(root / FOLDER, reading) if packed else None
    if pack is not None:
        pack.check_size(preparation.evaluation(reading).resize or preparation.size)
    for part, images in lists.items():
        class_counts(images, classes, f"the {part} list")
        if location is not None:
            continue
        if pack is None:
            check_files(images, root, f"the {part} list")
        else:
            pack.check(images.paths, f"the {part} list")
        strays = outside(images)
        if strays:
            notes += (
                f"{part}: {len(strays)} of {len(images)} listed paths are outside {root}; the first is "
                f"{strays[0]}",
            )
    class_map = map_by_count(counts)
    old_names = class_names or tuple(str(label) for label in range(classes))
    new_names = tuple(old_names[old] for old in np.argsort(class_map))
    sets = {
        part: FileImages(
            root,
            images.relabeled(class_map),
            preparation,
            workers,
            corrupt,
            reading,
            pack=pack,
            location=location,
        )
        for part, images in lists.items()
    }
    selection = list_hash(sets["train"].images, new_names)
    if corrupt == "skip":
        sets = {part: images.readable(progress=progress) for part, images in sets.items()}
        for part, found in sets.items():
            if found.left_out:
                notes += (
                    f"{part}: removed {len(found.left_out)} unreadable images; the first is "
                    f"{found.left_out[0]}",
                )
    left = np.bincount(sets["train"].targets, minlength=classes)
    if (left == 0).any():
        lost = new_names[int(np.flatnonzero(left == 0)[0])]
        raise DataError(
            f"{int((left == 0).sum())} classes have no readable training image; the first is {lost!r}. "
            "Replace the files or remove these classes"
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
    """Yield the hash of every list of a published data set, and whether it is the published one."""
    info = LISTED[name]
    for file in info.totals:
        found = list_hash(read_list(find_list(settings.root, file)))
        known = info.hashes.get(file)
        if known is None:
            verdict = "published hash not known"
        elif known == found:
            verdict = "published list"
        else:
            verdict = f"NOT the published list, {known}: order or files differ"
        yield f"{file}, SHA-256: {found} ({verdict})"


def _load(name: str, settings: ImageFileSettings, progress: bool) -> LongTailData:
    return load_listed(
        LISTED[name],
        settings.root,
        size=settings.image_size,
        workers=settings.workers,
        corrupt=settings.corrupt,
        packed=settings.packed,
        progress=progress,
    )


for _name, _recipe in (
    ("imagenet-lt", IMAGENET),
    ("inaturalist18", {**IMAGENET, **layer(CODE, lr=0.1)}),
    ("places-lt", PLACES),
):
    register_dataset(
        DataSetPart(
            name=_name,
            build=partial(_load, _name),
            summary=f"long-tailed photographs of {LISTED[_name].num_classes} classes",
            settings=ImageFileSettings,
            where=LISTED[_name].where,
            recipe=_recipe,
            check=partial(check_lists, _name),
        )
    )
