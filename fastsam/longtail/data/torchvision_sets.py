"""Classification data sets of torchvision, cut to a long tail and named ``torchvision:NAME``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.extras import requires_extra
from fastsam.longtail.data.catalog import DATASETS, DataSetPart, RootSettings
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.long_tailed import (
    CutSettings,
    LabeledPixels,
    Normalization,
    cut_to_long_tail,
)
from fastsam.longtail.data.shared_recipes import CIFAR
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.settings import borrowed, layer, setting
from fastsam.progress import ProgressBar

TORCHVISION = "torchvision:"

_CAO: Normalization = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NORMALIZATIONS: dict[str, Normalization] = {
    "CIFAR10": _CAO,  # both CIFARs: code of Cao et al. 2019
    "CIFAR100": _CAO,
    "MNIST": ((0.1307,), (0.3081,)),  # PyTorch's MNIST example
    "FashionMNIST": ((0.2860,), (0.3530,)),  # all 60,000 training images
}
"""Published mean and standard deviation of pixels. For other data sets they are computed from the selected
training images."""

UPRIGHT = frozenset({"EMNIST", "KMNIST", "MNIST", "QMNIST", "RenderedSST2", "SVHN", "USPS"})
"""Data sets of digits and text, which are not flipped because that changes their meaning."""

EMNISTSplit = Literal["balanced", "byclass", "bymerge", "letters", "digits", "mnist"]


@dataclass(frozen=True, kw_only=True)
class DownloadSettings(CutSettings, RootSettings):
    """Settings of long-tailed data sets whose files torchvision can download."""

    download: bool = setting(
        "download the data set if it is not in data_root", default=False, place=True
    )


@dataclass(frozen=True, kw_only=True)
class TorchvisionSettings(DownloadSettings):
    """Settings of ``torchvision:NAME``."""

    emnist_split: EMNISTSplit | None = setting(
        "split of EMNIST", optional=True, default_text="balanced"
    )


def load_torchvision_lt(
    reader: str, settings: DownloadSettings, *, name: str, progress: bool = True
) -> LongTailData:
    """Load a torchvision data set and cut its training images to a long tail.

    Classes without training images, such as ``N/A`` of EMNIST's letters, are removed.

    Args:
        reader: name of a class in ``torchvision.datasets`` with a training and a test set, whose items are
            (PIL image, class) with images of equal size.
        settings: folder of the files, and the cut.
        name: name on the command line.
        progress: show progress while images are read.

    Raises:
        UsageError: if the data set has another form, or the cut is not possible.
        DataError: if files are missing or damaged.
    """
    with requires_extra("longtail", name):
        parts = _opened(reader, settings)
    pixels = [_read(part, reader, progress=progress) for part in parts]
    train, test, labels = _without_empty_classes(*pixels)
    return cut_to_long_tail(
        name,
        _names(parts[0], labels),
        train,
        test,
        settings,
        normalization=NORMALIZATIONS.get(reader),
        flips=reader not in UPRIGHT,
    )


def _opened(reader: str, settings: DownloadSettings) -> list[Any]:
    """Open the training set and the test set with torchvision."""
    from torchvision import datasets

    made: Any = getattr(datasets, reader, None) if reader in datasets.__all__ else None
    if torch.utils.data.Dataset not in getattr(made, "__mro__", ()):
        raise UsageError(
            f"torchvision.datasets has no data set {reader!r}; names are case-sensitive, for "
            "instance CIFAR10, EMNIST, KMNIST, STL10, SVHN, USPS"
        )
    takes = _parameters(made)
    options: dict[str, Any] = {}
    if settings.download and "download" not in takes:
        raise UsageError(
            f"torchvision cannot download {reader}; put its files into data_root and omit --download"
        )
    if "download" in takes:
        options["download"] = settings.download
    emnist_split = getattr(settings, "emnist_split", None)
    if reader == "EMNIST":
        options["split"] = emnist_split or "balanced"
    elif emnist_split is not None:
        raise UsageError(
            f"emnist_split requires data torchvision:EMNIST, got torchvision:{reader}; omit it"
        )
    if "train" in takes:
        splits: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    elif "split" in takes:
        splits = [{"split": "train"}, {"split": "test"}]
    else:
        raise UsageError(
            f"data torchvision:NAME requires a training and a test set, but {reader} has none; sort its "
            "images into class folders and use --data folder"
        )
    try:
        return [made(str(settings.root), **options, **split) for split in splits]
    except ModuleNotFoundError:
        raise
    except Exception as error:  # damaged files can raise any of a dozen types of exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        source = "with --download" if "download" in takes else "as described by torchvision's docs"
        raise DataError(
            f"{reader} is missing or damaged in {settings.root}: {reason}; pass --data-root DIR, or delete "
            f"damaged files and get them again {source}"
        ) from error


def _parameters(made: type) -> set[str]:
    """Return the names of the arguments of a class, including those that it passes to its bases."""
    names: set[str] = set()
    for owner in made.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        names |= {item.name for item in parameters}
        if not any(item.kind is item.VAR_KEYWORD for item in parameters):
            break
    return names


def _read(part: Any, reader: str, *, progress: bool) -> LabeledPixels:
    """Read all images and classes of a torchvision data set.

    Raises:
        UsageError: if images or classes have another form.
        DataError: if the data set is empty, or the numbers of images and labels differ.
    """
    if len(part) == 0 or len(getattr(part, "targets", part)) != len(part):
        raise DataError(
            f"{reader} must have as many labels as images, at least 1, got {len(part)} images and "
            f"{len(getattr(part, 'targets', part))} labels; delete its files and download them again with "
            "--download"
        )
    targets = np.empty(len(part), dtype=np.int64)
    pixels: NDArray[np.uint8] | None = None
    for place, (image, label) in enumerate(_items(part, reader, progress=progress)):
        if pixels is None:
            pixels = np.empty((len(part), *image.shape), dtype=np.uint8)
        if image.shape != pixels.shape[1:]:
            raise UsageError(
                f"images of torchvision's {reader} must have the same size and channels, got "
                f"{pixels.shape[1:]} and {image.shape}; sort them into class folders and use --data "
                "folder, which resizes them to --image-size"
            )
        pixels[place], targets[place] = image, label
    channels_first = np.ascontiguousarray(np.moveaxis(np.asarray(pixels), -1, 1))
    return LabeledPixels(torch.from_numpy(channels_first), targets)


def _items(part: Any, reader: str, *, progress: bool) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Iterate over pixels ``[H, W, C]`` and class of all images."""
    from PIL.Image import Image

    with ProgressBar(
        total=len(part), description=f"Reading {reader}", unit="image", enabled=progress
    ) as bar:
        for place in range(len(part)):
            item = part[place]
            try:
                image, label = item
                label = index(label)
            except (TypeError, ValueError) as error:
                raise _unsuitable(reader, item) from error
            if not isinstance(image, Image) or image.mode not in ("L", "RGB") or label < 0:
                raise _unsuitable(reader, item)
            array = np.asarray(image)
            yield array.reshape(*array.shape[:2], -1), label
            bar.update()


def _unsuitable(reader: str, item: object) -> UsageError:
    return UsageError(
        f"items of torchvision's {reader} must be (grayscale or RGB image, class), got {item!r:.80}; pass "
        "the data from Python with from_datasets()"
    )


def _without_empty_classes(
    train: LabeledPixels, test: LabeledPixels
) -> tuple[LabeledPixels, LabeledPixels, NDArray[np.int64]]:
    """Remove classes without training images: return both sets relabeled, and the remaining labels."""
    labels = np.unique(train.targets)
    strange = np.setdiff1d(test.targets, labels)
    if len(strange):
        raise DataError(
            f"label {strange[0]} of the test set has no training image; delete the files and download them "
            "again with --download"
        )
    renumbered = [
        LabeledPixels(part.pixels, np.searchsorted(labels, part.targets)) for part in (train, test)
    ]
    return renumbered[0], renumbered[1], labels


def _names(part: Any, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Return the names of the classes, or the labels if the data set has no names."""
    known: object = getattr(part, "classes", None)
    if isinstance(known, Sequence) and len(known) > labels.max():
        return tuple(str(known[label]) for label in labels)
    return tuple(str(label) for label in labels)


def _family(full_name: str) -> DataSetPart:
    reader = full_name.removeprefix(TORCHVISION)

    def load(settings: TorchvisionSettings, progress: bool) -> LongTailData:
        return load_torchvision_lt(reader, settings, name=full_name, progress=progress)

    return DataSetPart(
        name=full_name,
        build=load,
        summary=f"torchvision's {reader}, cut to a long tail",
        settings=TorchvisionSettings,
        recipe={
            **layer("as CIFAR-LT", known=False, imbalance=100.0, kind="exp", subset_seed=0),
            **borrowed(CIFAR, "the recipe of CIFAR-LT"),
        },
    )


DATASETS.add_family(TORCHVISION, _family)
