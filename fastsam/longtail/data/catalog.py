"""The data sets by name, and the settings that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.groups import check_every_class
from fastsam.longtail.data.pixels import Exif, Reading
from fastsam.longtail.data.subset import ImbalanceKind
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.settings import (
    Entry,
    Settings,
    setting,
    settings_of,
)
from fastsam.records import build

Corrupt = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class ImbalanceSettings(Settings):
    """Settings of the data sets that are made long-tailed here."""

    imbalance: float = setting("imbalance factor: largest over smallest class count", low=1)
    kind: ImbalanceKind = setting("shape of the imbalance: exp or step", default="exp")
    subset_seed: int = setting(
        "seed of the subset, apart from the seed of the training",
        default=0,
        low=0,
        high=2**32 - 1,
    )
    label_noise: float = setting(
        "share of the training labels that are replaced by another class, chosen by subset_seed",
        default=0.0,
        before=0.0,
        low=0,
        high=1,
    )


@dataclass(frozen=True, kw_only=True)
class RootSettings(Settings):
    """The setting of data sets that lie in a folder."""

    data_root: str = setting("folder with the data", default="data", place=True)

    @property
    def root(self) -> Path:
        """The folder."""
        return Path(self.data_root)


@dataclass(frozen=True, kw_only=True)
class ImageFileSettings(RootSettings):
    """Settings of data sets whose images are read from files."""

    image_size: int = setting(
        "height and width of the network's input", default=224, low=1, high=4096
    )
    workers: int = setting("processes that read images", default=4, low=0, high=1024, place=True)
    corrupt: Corrupt = setting(
        "at an image that cannot be read: stop, or skip it and count it",
        default="stop",
        place=True,
    )


@dataclass(frozen=True, kw_only=True)
class OwnFileSettings(ImageFileSettings):
    """Settings of the user's own image files."""

    exif: Exif = setting(
        "EXIF orientation of images: transpose (turn them by it) or ignore",
        default="transpose",
        before="ignore",
    )
    value_range: tuple[float, float] | None = setting(
        "values that become black and white in images of more than 8 bits; by default 0 and "
        "65535 for 16 bits, 0 and 1 for floats",
        optional=True,
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """The range of values rises."""
        super().check(run)
        limits = self.value_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise UsageError(f"value_range needs two rising values, got {limits}")

    @property
    def reading(self) -> Reading:
        """How pixels become numbers."""
        return Reading(self.exif, self.value_range)


@dataclass(frozen=True, kw_only=True)
class DataSetPart(RunPart):
    """A data set; once it is registered, ``--data NAME`` trains on it.

    Training settings that its recipe lacks are those of CIFAR-LT, as starting points.

    Attributes:
        build: ``build(settings, progress)`` loads it; :func:`~fastsam.longtail.data.from_datasets`
            makes one of any torch datasets.
        where: where its users get the files.
        own: whether it is whatever lies in the folder that it is given.
        check: yields further findings of ``data check``, one per line, given the settings.
    """

    build: Callable[[Any, bool], LongTailData]
    where: str = ""
    own: bool = False
    check: Callable[[Any], Iterator[str]] = field(default=lambda settings: iter(()))


DATASETS: Registry[DataSetPart] = Registry("data", "fastsam.longtail.data")


register_dataset = DATASETS.add

GIVEN = "own:"
"""Begins the names of data sets that are given from Python; what follows is the user's choice."""


def is_given(name: str) -> bool:
    """Whether ``name`` is that of a data set given from Python, ``own:NAME``."""
    return name.startswith(GIVEN) and len(name) > len(GIVEN)


def _given(name: str) -> DataSetPart:
    def load(settings: Settings, progress: bool) -> LongTailData:
        raise UsageError(
            f"{name} is data that a Python program made, which no command can load; pass it as "
            "data=..., or write it to files for the data sets list or folder"
        )

    return DataSetPart(name=name, summary="data that a Python program passes", build=load)


DATASETS.add_family(GIVEN, _given)
for _removed in ("glyphs10-lt", "glyphs100-lt"):
    DATASETS.remove(
        _removed,
        "the package no longer draws images; `fastsam report` still reads results of such runs, but "
        "they can be neither resumed nor evaluated; fashion-mnist-lt has real images",
    )


def dataset_settings(name: str, **values: Any) -> Settings:
    """The settings of a data set; those that are not given are of its recipe.

    Args:
        name: one of :data:`DATASETS`.
        **values: settings by name; paths are taken for strings.

    Raises:
        UsageError: for an unknown data set or setting, or a value that is not valid.
    """
    part = DATASETS[name]
    chosen: dict[str, Any] = {}
    for item in settings_of(part.settings):
        entry: Entry | Any = part.recipe.get(item.name, item.metadata["default"])
        if isinstance(entry, Entry):
            chosen[item.name] = entry.value
    chosen |= {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}
    try:
        settings = build(part.settings, chosen)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"data {name}: {error}") from error
    settings.check({})
    return settings


def load_dataset(name: str, *, progress: bool = True, **values: Any) -> LongTailData:
    """The data set called ``name``, checked: every class has at least one training image.

    Args:
        name: one of :data:`DATASETS`.
        progress: show progress while images are made or scanned.
        **values: settings of the data set, such as ``imbalance=100`` or ``data_root="data"``; those
            that are not given are of its recipe.

    Raises:
        UsageError: for an unknown name or setting, or an impossible imbalance.
        DataError: for missing or damaged files, or labels and counts that disagree.

    Example:
        >>> load_dataset("digits-lt", imbalance=10).counts.tolist()
        [100, 77, 59, 46, 35, 27, 21, 16, 12, 10]
    """
    return load_with(name, dataset_settings(name, **values), progress=progress)


def load_with(name: str, settings: Settings, *, progress: bool = True) -> LongTailData:
    """The data set called ``name`` with ``settings``; see :func:`load_dataset`."""
    part = DATASETS[name]
    try:
        data = part.build(settings, progress)
    except DataError as error:
        where = f". Where to get {name}: {part.where}" if part.where else ""
        raise DataError(f"{error}{where}") from error
    check_every_class(data.counts, f"the training set of {name}")
    return data
