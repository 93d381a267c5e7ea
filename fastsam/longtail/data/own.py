"""The user's own images: list files or class folders."""

from __future__ import annotations

from collections.abc import Callable

from fastsam.longtail.data.catalog import DataSetPart, register_dataset
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.listed import find_list, list_forms
from fastsam.longtail.data.lists import ImageList, describe_left_out, list_folder, read_list
from fastsam.longtail.data.own_set import OwnImages
from fastsam.longtail.data.own_settings import OwnFileSettings
from fastsam.longtail.data.pack import FOLDER
from fastsam.longtail.data.shared_recipes import OWN

_FOLDERS = {"train": "train", "test": "test", "validation": "val"}


def load_own_lists(settings: OwnFileSettings, progress: bool = False) -> LongTailData:
    """Load the user's own lists: ``root/train.txt`` and optionally ``root/test.txt`` and ``root/val.txt``.

    Each may be compressed (``.gz``, ``.xz``). Paths are relative to ``root``. Counts and groups (by count)
    come from the training list.

    Raises:
        DataError: if a path is listed more than once, the lists are not valid, or there is no test part; see
            :meth:`OwnImages.load`.
    """
    root = settings.root
    lists = {"train": read_list(find_list(root, "train.txt"))}
    for part in ("test", "validation"):
        name = f"{_FOLDERS[part]}.txt"
        if list_forms(root, name):
            lists[part] = read_list(find_list(root, name))
    return OwnImages(
        "list",
        root,
        lists,
        missing_test=f"create {root / 'test.txt'}",
        packed=settings.packed,
    ).load(settings, progress=progress)


def load_own_folders(settings: OwnFileSettings, progress: bool = False) -> LongTailData:
    """Load the user's own folders: ``train/CLASS``, and optionally ``test/CLASS`` and ``val/CLASS``.

    If none of the three exists, the class folders are those of ``root`` itself.
    """
    root = settings.root
    if not any((root / folder).is_dir() for folder in _FOLDERS.values()):
        found = {"train": ("", list_folder(root, ignored=(FOLDER,)))}
    else:
        train = list_folder(root / "train")
        found = {"train": ("train/", train)}
        for part in ("test", "validation"):
            folder = _FOLDERS[part]
            if (root / folder).is_dir():
                found[part] = (f"{folder}/", list_folder(root / folder, train.class_names))
    notes = tuple(
        f"{part}: ignored {describe_left_out(inside.left_out)}"
        for part, (_, inside) in found.items()
        if inside.left_out
    )
    return OwnImages(
        "folder",
        root,
        {part: _under(inside.images, folder) for part, (folder, inside) in found.items()},
        missing_test=f"create {root / 'test'} with one folder per class",
        class_names=tuple(found["train"][1].class_names),
        packed=settings.packed,
        notes=notes,
    ).load(settings, progress=progress)


def _under(images: ImageList, folder: str) -> ImageList:
    return ImageList([f"{folder}{path}" for path in images.paths], images.targets)


_Load = Callable[[OwnFileSettings, bool], LongTailData]
_PARTS: tuple[tuple[str, _Load, str], ...] = (
    (
        "list",
        load_own_lists,
        "create train.txt, and optionally test.txt and val.txt, with lines `path label`",
    ),
    (
        "folder",
        load_own_folders,
        "create class folders with images: CLASS, or train/CLASS and optionally test/CLASS and val/CLASS",
    ),
)
for _name, _load, _where in _PARTS:
    register_dataset(
        DataSetPart(
            name=_name,
            build=_load,
            summary=_where,
            settings=OwnFileSettings,
            where=_where,
            own=True,
            recipe=OWN,
        )
    )
