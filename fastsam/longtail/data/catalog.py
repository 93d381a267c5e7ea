"""Registry of data sets, and the settings that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.groups import check_every_class
from fastsam.longtail.data.subset import ImbalanceKind
from fastsam.longtail.data.worker_count import WorkerSettings
from fastsam.longtail.errors import DataError, UsageError, unknown
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
    """Settings of data sets that fastsam cuts to a long tail."""

    imbalance: float = setting(
        "imbalance factor: size of the largest class divided by the size of the smallest", low=1
    )
    kind: ImbalanceKind = setting(
        "profile of the class counts: exp (exponential decay) or step (two levels)", default="exp"
    )
    subset_seed: int = setting(
        "seed of the choice of training images; the seed of training does not affect this choice",
        default=0,
        low=0,
        high=2**32 - 1,
    )
    label_noise: float = setting(
        "fraction of the training labels that are replaced by another class, sampled with subset_seed",
        default=0.0,
        before=0.0,
        low=0,
        high=1,
    )


@dataclass(frozen=True, kw_only=True)
class RootSettings(Settings):
    """Setting of data sets that are read from a folder."""

    data_root: str = setting("folder with the data", default="data", place=True)

    @property
    def root(self) -> Path:
        """``data_root`` as a path."""
        return Path(self.data_root)


@dataclass(frozen=True, kw_only=True)
class ImageSettings(WorkerSettings):
    """Settings of data sets whose images are decoded while they are read."""

    image_size: int = setting(
        "height and width of the network's input in pixels", default=224, low=1, high=4096
    )
    corrupt: Corrupt = setting(
        "what to do with an unreadable image: stop (with an error) or skip (and count it)",
        default="stop",
        place=True,
    )


@dataclass(frozen=True, kw_only=True)
class ImageFileSettings(ImageSettings, RootSettings):
    """Settings of data sets whose images are read from files."""

    packed: bool = setting(
        "read the packed copy that `fastsam data pack` wrote instead of the image files",
        default=False,
        before=False,
    )


@dataclass(frozen=True, kw_only=True)
class DataSetPart(RunPart):
    """A data set. Once it is registered, ``--data NAME`` trains on it.

    If its recipe has no training settings, those of CIFAR-LT are used as starting points.

    Attributes:
        build: ``build(settings, progress)`` loads the data set.
            :func:`~fastsam.longtail.data.from_datasets` creates one from torch datasets.
        where: where to get the files, for error messages.
        own: whether it reads the user's own data from a folder.
        check: ``check(settings)`` yields additional lines for ``fastsam data check``.
    """

    build: Callable[[Any, bool], LongTailData]
    where: str = ""
    own: bool = False
    check: Callable[[Any], Iterator[str]] = field(default=lambda settings: iter(()))


DATASETS: Registry[DataSetPart] = Registry("data", "fastsam.longtail.data")


register_dataset = DATASETS.add

GIVEN = "own:"
"""Prefix of the names of data sets that are passed from Python: ``own:NAME``."""


def is_given(name: str) -> bool:
    """Return whether ``name`` is the name of a data set passed from Python, ``own:NAME``."""
    return name.startswith(GIVEN) and len(name) > len(GIVEN)


def _given(name: str) -> DataSetPart:
    def load(settings: Settings, progress: bool) -> LongTailData:
        raise UsageError(
            f"data set {name} was created in Python and cannot be loaded by a command; pass it to the "
            "Python function as data=..., or write it to files for the data set list or folder"
        )

    return DataSetPart(name=name, summary="your own data, passed from Python", build=load)


DATASETS.add_family(GIVEN, _given, listed=False)  # the command line cannot load them
for _removed in ("glyphs10-lt", "glyphs100-lt"):
    DATASETS.remove(
        _removed,
        "fastsam no longer generates images; use fashion-mnist-lt, which has real images. `fastsam report` "
        "still reads results of such runs, but they cannot be resumed or evaluated",
    )


def dataset_settings(name: str, **values: Any) -> Settings:
    """Return the settings of a data set. Settings without a value come from its recipe.

    Args:
        name: one of :data:`DATASETS`.
        **values: settings by name; paths are converted to strings.

    Raises:
        UsageError: if the data set or a setting is unknown, or a value is not valid.
    """
    part = DATASETS[name]
    chosen: dict[str, Any] = {}
    known = [item.name for item in settings_of(part.settings)]
    for key in values:
        if key not in known:
            hint = str(unknown("setting", key, known, brief=True)).partition(repr(key))[2]
            raise UsageError(f"data set {name} has no setting {key!r}{hint.replace(',', ';', 1)}")
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
    """Load a data set, and check that every class has at least one training image.

    Args:
        name: one of :data:`DATASETS`.
        progress: show progress while images are downloaded or scanned.
        **values: settings of the data set, such as ``imbalance=100`` or ``data_root="data"``. Settings
            without a value come from its recipe.

    Raises:
        UsageError: if the name or a setting is unknown, or the imbalance is impossible.
        DataError: if files are missing or damaged, or labels and counts are inconsistent.

    Example:
        >>> load_dataset("digits-lt", imbalance=10).counts.tolist()
        [100, 77, 59, 46, 35, 27, 21, 16, 12, 10]
    """
    return load_with(name, dataset_settings(name, **values), progress=progress)


def load_with(name: str, settings: Settings, *, progress: bool = True) -> LongTailData:
    """Load the data set called ``name`` with ``settings``; see :func:`load_dataset`."""
    part = DATASETS[name]
    try:
        data = part.build(settings, progress)
    except DataError as error:
        where = f". To use {name}: {part.where}" if part.where else ""
        raise DataError(f"{error}{where}") from error
    check_every_class(data.counts, f"the training set of {name}")
    return data
