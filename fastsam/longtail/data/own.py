"""The user's own images: list files or class folders."""

from __future__ import annotations

from collections.abc import Mapping

from fastsam.longtail.data.catalog import DataSetPart, OwnFileSettings, register_dataset
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.duplicates import repeated_paths
from fastsam.longtail.data.files import Preparation
from fastsam.longtail.data.listed import assemble, find_list, list_forms
from fastsam.longtail.data.lists import ImageList, describe_left_out, list_folder, read_list
from fastsam.longtail.data.shared_recipes import IMAGENET
from fastsam.longtail.errors import DataError
from fastsam.longtail.settings import borrowed


def load_own_lists(settings: OwnFileSettings, progress: bool = False) -> LongTailData:
    """Load the user's own lists: ``root/train.txt``, ``root/test.txt`` and optionally ``root/val.txt``.

    Each may be compressed (``.gz``, ``.xz``). Paths are relative to ``root``. Counts and groups (by count)
    come from the training list.

    Raises:
        DataError: if a path is listed more than once, or the lists are not valid; see :func:`assemble`.
    """
    root = settings.root
    names = {"train": "train.txt", "test": "test.txt"}
    if list_forms(root, "val.txt"):
        names["validation"] = "val.txt"
    lists = {part: read_list(find_list(root, name)) for part, name in names.items()}
    return _own("list", lists, settings, progress=progress)


def load_own_folders(settings: OwnFileSettings, progress: bool = False) -> LongTailData:
    """Load the user's own folders: ``train/CLASS``, ``test/CLASS`` and optionally ``val/CLASS``."""
    root = settings.root
    train = list_folder(root / "train")
    found = {"train": ("train", train)}
    for part, folder in (("test", "test"), ("validation", "val")):
        if part == "test" or (root / folder).is_dir():
            found[part] = (folder, list_folder(root / folder, train.class_names))
    notes = tuple(
        f"{part}: ignored {describe_left_out(inside.left_out)}"
        for part, (_, inside) in found.items()
        if inside.left_out
    )
    return _own(
        "folder",
        {part: _under(inside.images, folder) for part, (folder, inside) in found.items()},
        settings,
        progress=progress,
        class_names=tuple(train.class_names),
        notes=notes,
    )


def _own(
    name: str,
    lists: Mapping[str, ImageList],
    settings: OwnFileSettings,
    *,
    progress: bool,
    class_names: tuple[str, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> LongTailData:
    faults = repeated_paths(lists)
    if faults:
        raise DataError(
            f"{'; '.join(faults)}. Repeated images make counts wrong or leak training images into the test "
            "set; list every image once"
        )
    return assemble(
        name,
        lists,
        settings.root,
        num_classes=None,
        boundaries=None,
        preparation=Preparation(settings.image_size),
        reading=settings.reading,
        workers=settings.workers,
        corrupt=settings.corrupt,
        packed=settings.packed,
        progress=progress,
        class_names=class_names,
        notes=notes,
    )


def _under(images: ImageList, folder: str) -> ImageList:
    return ImageList([f"{folder}/{path}" for path in images.paths], images.targets)


for _name, _load, _where in (
    (
        "list",
        load_own_lists,
        "create train.txt, test.txt and optionally val.txt with lines `path label`",
    ),
    (
        "folder",
        load_own_folders,
        "create folders train/CLASS, test/CLASS and optionally val/CLASS with images",
    ),
):
    register_dataset(
        DataSetPart(
            name=_name,
            build=_load,
            summary=_where,
            settings=OwnFileSettings,
            where=_where,
            own=True,
            recipe=borrowed(IMAGENET, "the ImageNet-LT recipe"),
        )
    )
