"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastsam.longtail.data.cifar import load_cifar_lt
from fastsam.longtail.data.dataset import LongTailData, check_every_class
from fastsam.longtail.data.digits import load_digits_lt
from fastsam.longtail.data.glyphs import SPECS, load_glyphs_lt
from fastsam.longtail.data.listed import LISTED, load_listed, load_own_folders, load_own_lists
from fastsam.longtail.data.pixels import Exif, Reading
from fastsam.longtail.data.subset import ImbalanceKind
from fastsam.longtail.errors import DataError, UsageError, unknown


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Everything that any data set can be asked for; each reads what it has.

    Attributes:
        imbalance: imbalance factor of the sets made long-tailed here.
        kind: profile of that imbalance.
        subset_seed: seed of that selection.
        root: folder with the files; not for ``digits-lt`` and glyphs.
        download: fetch CIFAR if it is not there.
        size: height and width of images read from files.
        workers: processes that read them.
        corrupt: ``stop`` or ``skip`` at a file that cannot be read.
        exif: whether files of the user's own data are turned as their EXIF orientation says.
        value_range: values that become 0 and 1 in the user's own images of more than 8 bits; see
            :class:`fastsam.longtail.data.pixels.Reading`.
        progress: show progress while glyphs are drawn or files are scanned.
    """

    imbalance: float = 50.0
    kind: ImbalanceKind = "exp"
    subset_seed: int = 0
    root: Path = Path("data")
    download: bool = False
    size: int = 224
    workers: int = 4
    corrupt: str = "stop"
    exif: Exif = "transpose"
    value_range: tuple[float, float] | None = None
    progress: bool = True


Loader = Callable[[DataOptions], LongTailData]


def _digits(options: DataOptions) -> LongTailData:
    return load_digits_lt(
        imbalance=options.imbalance, kind=options.kind, subset_seed=options.subset_seed
    )


def _cifar(num_classes: int, options: DataOptions) -> LongTailData:
    return load_cifar_lt(
        num_classes,
        options.root,
        imbalance=options.imbalance,
        kind=options.kind,
        subset_seed=options.subset_seed,
        download=options.download,
    )


def _glyphs(num_classes: int, options: DataOptions) -> LongTailData:
    return load_glyphs_lt(
        SPECS[num_classes],
        imbalance=options.imbalance,
        kind=options.kind,
        subset_seed=options.subset_seed,
        progress=options.progress,
    )


def _listed(name: str, options: DataOptions) -> LongTailData:
    return load_listed(
        LISTED[name],
        options.root,
        size=options.size,
        workers=options.workers,
        corrupt=options.corrupt,
        progress=options.progress,
    )


def _own(load: Callable[..., LongTailData], options: DataOptions) -> LongTailData:
    return load(
        options.root,
        size=options.size,
        reading=Reading(options.exif, options.value_range),
        workers=options.workers,
        corrupt=options.corrupt,
        progress=options.progress,
    )


CIFAR = ("cifar10-lt", "cifar100-lt")
GLYPHS = ("glyphs10-lt", "glyphs100-lt")
MADE_LONG_TAILED = ("digits-lt", *CIFAR, *GLYPHS)
OWN = ("list", "folder")
"""Data sets that are whatever lies in the folder they are given."""
GIVEN = "own:"
"""Begins the names of data sets that are given from Python; what follows is the user's choice."""
FROM_FILES = (*LISTED, *OWN)

DATASETS: dict[str, Loader] = {
    "digits-lt": _digits,
    "cifar10-lt": partial(_cifar, 10),
    "cifar100-lt": partial(_cifar, 100),
    "glyphs10-lt": partial(_glyphs, 10),
    "glyphs100-lt": partial(_glyphs, 100),
    **{name: partial(_listed, name) for name in LISTED},
    "list": partial(_own, load_own_lists),
    "folder": partial(_own, load_own_folders),
}

_KRIZHEVSKY = "www.cs.toronto.edu/~kriz/cifar.html; `fastsam train --download` fetches it"

WHERE: dict[str, str] = {
    "digits-lt": "comes with scikit-learn",
    "cifar10-lt": f"cifar-10-python.tar.gz from {_KRIZHEVSKY}",
    "cifar100-lt": f"cifar-100-python.tar.gz from {_KRIZHEVSKY}",
    **dict.fromkeys(GLYPHS, "drawn here, once, with the fonts of matplotlib"),
    **{name: info.where for name, info in LISTED.items()},
    "list": "your own: train.txt, test.txt and perhaps val.txt with lines `path label`",
    "folder": "your own: train/CLASS, test/CLASS and perhaps val/CLASS",
}
"""Where the users of each data set usually get it."""


def is_given(name: str) -> bool:
    """Whether ``name`` is that of a data set given from Python, ``own:NAME``."""
    return name.startswith(GIVEN) and len(name) > len(GIVEN)


def load_dataset(name: str, options: DataOptions | None = None) -> LongTailData:
    """The data set called ``name``, checked: every class has at least one training image.

    Args:
        name: one of :data:`DATASETS`.
        options: what is asked of it; None for the defaults.

    Raises:
        UsageError: for an unknown name or an impossible imbalance.
        DataError: for missing or damaged files, or labels and counts that disagree.
    """
    if is_given(name):
        raise UsageError(
            f"{name} is data that a Python program made, which no command can load; pass it as "
            "data=..., or write it to files for the data sets list or folder"
        )
    if name not in DATASETS:
        raise unknown("data", name, DATASETS)
    try:
        data = DATASETS[name](options or DataOptions())
    except DataError as error:
        raise DataError(f"{error}. Where to get {name}: {WHERE[name]}") from error
    check_every_class(data.counts, f"the training set of {name}")
    return data
