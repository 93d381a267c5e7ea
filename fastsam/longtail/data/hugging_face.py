"""Image classification data sets of Hugging Face ``datasets``, named ``hf:NAME``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsam.extras import requires_extra
from fastsam.longtail.data.catalog import DATASETS, DataSetPart
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.encoded import Encoded
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.own_set import OwnImages, named_classes
from fastsam.longtail.data.own_settings import OwnSettings, TableSettings
from fastsam.longtail.data.shared_recipes import OWN
from fastsam.longtail.errors import DataError, UsageError, unknown
from fastsam.longtail.settings import setting

HUGGING_FACE = "hf:"
_FILES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
"""Readers of single files, by suffix."""
_SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder of ``save_to_disk`` is recognized."""
NO_SPLIT = "none"
"""Value of the settings of splits that leaves a part out."""
_VALIDATION = ("validation", "val", "valid", "dev")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSettings(TableSettings, OwnSettings):
    """Settings of ``hf:NAME``."""

    hf_config: str | None = setting(
        "configuration of the Hugging Face data set", optional=True, default_text="its only one"
    )
    image_column: str | None = setting(
        "column of the images", optional=True, default_text="the only column of images"
    )
    train_split: str = setting("split with the training images", default="train")
    validation_split: str | None = setting(
        "split with the validation images; none leaves them out",
        optional=True,
        default_text=f"the first of {', '.join(_VALIDATION)} that there is",
    )
    test_split: str = setting(
        "split with the test images; none leaves them out, so that split_test can hold out others",
        default="test",
    )


@dataclass(frozen=True)
class TableImages:
    """Finds encoded images in tables by names ``SPLIT/ROW``.

    Attributes:
        tables: the splits, whose images are not decoded.
        column: column of the images.
    """

    tables: Mapping[str, Any]
    column: str

    def __call__(self, name: str) -> Encoded:
        """Return the content of an image, or the path of its file; no bytes for an empty cell."""
        split, _, row = name.rpartition("/")
        cell = self.tables[split][int(row)][self.column]
        if cell is None:
            return b""
        content: bytes | None = cell["bytes"]
        return Path(cell["path"]) if content is None else content


def load_hugging_face(
    source: str, settings: HuggingFaceSettings, *, name: str, progress: bool = False
) -> LongTailData:
    """Load a data set of Hugging Face.

    Args:
        source: name on the hub, a file (parquet, arrow, JSON lines), a folder that ``save_to_disk`` wrote, or
            a folder that ``datasets.load_dataset`` can read, such as one of images in class folders.
        settings: settings of the data set.
        name: name on the command line.
        progress: show progress while files are read.

    Raises:
        ImportError: if ``datasets`` is not installed.
        DataError: if the data set cannot be loaded, or splits, columns or labels are missing.
    """
    with requires_extra("huggingface", name):
        import datasets

    tables = _opened(source, settings, datasets)
    parts = _parts(tables, settings, name)
    features = tables[parts["train"]].features
    image = _column(
        settings.image_column, "--image-column", features, datasets.Image, name, "images"
    )
    label = settings.label_column
    if label is None and "label" in features:
        label = "label"
    label = _column(label, "--label-column", features, datasets.ClassLabel, name, "class labels")
    if settings.group_column is not None and settings.group_column not in features:
        raise unknown("group_column", settings.group_column, features)
    if not isinstance(features[image], datasets.Image):
        raise UsageError(
            f"column {image!r} of {name} must have images, got {features[image]}; pass --image-column NAME"
        )
    encoded = {
        split: tables[split]
        .select_columns([image])
        .cast_column(image, datasets.Image(decode=False))
        for split in parts.values()
    }
    values = {part: _values(tables[split], label, split) for part, split in parts.items()}
    known = getattr(features[label], "names", None)
    every = [value for found in values.values() for value in found]
    if known is None:
        names, targets = named_classes(every, lambda place: f"{name}, image {place}")
    else:
        names, targets = tuple(known), np.array(every, dtype=np.int64)
        if targets.min() < 0:
            raise DataError(
                f"{name} has images without a label (label {targets.min()}): {_unlabeled(values, parts)}"
            )
    lists, start = {}, 0
    for part, split in parts.items():
        count = len(values[part])
        paths = [f"{split}/{row}" for row in range(count)]
        lists[part] = ImageList(paths, targets[start : start + count])
        start += count
    groups = None
    if settings.group_column is not None:
        groups = {
            part: np.array(_values(tables[split], settings.group_column, split), dtype=object)
            for part, split in parts.items()
        }
    return OwnImages(
        name,
        Path(name),
        lists,
        missing_test=f"name one with --test-split (it has {', '.join(tables)})",
        leave_out=", or leave that part out with --{part}-split none",
        class_names=names,
        groups=groups,
        group_column=settings.group_column or "",
        location=TableImages(encoded, image),
    ).load(settings, progress=progress)


def _opened(source: str, settings: HuggingFaceSettings, datasets: Any) -> dict[str, Any]:
    """Open the data set, and return its splits by name."""
    path = Path(source).expanduser()
    local = path.exists()
    if not local and (path.is_absolute() or source.startswith(".") or path.suffix in _FILES):
        raise DataError(
            f"{path} does not exist; move it back, or pass hf:PATH or hf:NAME of a data set on the hub"
        )
    if settings.hf_config is not None and (path.is_file() or _is_saved(path)):
        raise UsageError(
            f"hf_config {settings.hf_config!r} would have no effect, because {path} is a single file or was "
            "written by save_to_disk, which have no configurations; omit it"
        )
    try:
        if path.is_file():
            if path.suffix not in _FILES:
                raise DataError(
                    f"cannot read {path}: expected a file with one of {', '.join(_FILES)}; convert it, or "
                    "pass its folder"
                )
            found = datasets.load_dataset(_FILES[path.suffix], data_files={"train": str(path)})
        elif _is_saved(path):
            found = datasets.load_from_disk(str(path))
        else:
            where = str(path) if local else source
            found = datasets.load_dataset(where, settings.hf_config)
    except DataError:
        raise
    except Exception as error:  # the library and its readers raise many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot load {source} with Hugging Face datasets: {reason}") from error
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def _parts(tables: Mapping[str, Any], settings: HuggingFaceSettings, name: str) -> dict[str, str]:
    """Return the names of the splits by part."""
    parts = {"train": settings.train_split}
    if settings.test_split != NO_SPLIT:
        if settings.test_split in tables:
            parts["test"] = settings.test_split
        elif settings.test_split != "test":
            raise unknown(f"split of {name}", settings.test_split, tables)
    validation = settings.validation_split
    if validation is None:
        taken = parts.values()
        validation = next((s for s in _VALIDATION if s in tables and s not in taken), None)
    if validation not in (None, NO_SPLIT):
        parts["validation"] = validation
    for split in parts.values():
        if split not in tables:
            raise unknown(f"split of {name}", split, tables)
    if len(set(parts.values())) < len(parts):
        raise UsageError(f"splits of {name} must differ, got {', '.join(parts.values())}")
    return parts


def _column(
    column: str | None,
    option: str,
    features: Mapping[str, Any],
    kind: type[Any],
    name: str,
    what: str,
) -> str:
    """Return the given column, or the only one of a kind."""
    if column is not None:
        if column not in features:
            raise unknown(option.removeprefix("--").replace("-", "_"), column, features)
        return column
    fitting = [found for found, feature in features.items() if isinstance(feature, kind)]
    if len(fitting) != 1:
        raise DataError(
            f"{name} has {len(fitting)} columns of {what}, expected one; it has {', '.join(features)}. Pass "
            f"{option} NAME"
        )
    return fitting[0]


def _values(table: Any, column: str, split: str) -> list[Any]:
    """Return a column, without empty cells."""
    values = list(table.select_columns([column])[:][column])
    if None in values:
        raise DataError(
            f"row {values.index(None)} of split {split} has no {column}; remove such rows"
        )
    return values


def _unlabeled(values: Mapping[str, list[Any]], parts: Mapping[str, str]) -> str:
    """Name the splits with unlabeled images, and what to do about them."""
    found = [part for part, labels in values.items() if min(labels) < 0]
    named = ", ".join(f"split {parts[part]!r}" for part in found)
    if "train" in found:
        return f"{named}; remove these images, or choose another split with --train-split"
    without = " ".join(f"--{part}-split none" for part in found)
    instead = " and hold out images with --split-test 0.2" if "test" in found else ""
    return f"{named}; leave it out with {without}{instead}, or choose another split"


def _located(source: str) -> str:
    """Return the absolute path of a local file or folder; names on the hub are returned unchanged.

    A run stores the result, so that it finds the same data from any folder, and never others on the hub.
    """
    path = Path(source).expanduser()
    local = path.is_absolute() or source.startswith(".") or path.exists()
    return os.path.abspath(path) if local else source


def _family(full_name: str) -> DataSetPart:
    source = _located(full_name.removeprefix(HUGGING_FACE))
    full_name = f"{HUGGING_FACE}{source}"

    def load(settings: HuggingFaceSettings, progress: bool) -> LongTailData:
        return load_hugging_face(source, settings, name=full_name, progress=progress)

    return DataSetPart(
        name=full_name,
        build=load,
        summary="a data set of Hugging Face: a name on the hub, a file, or a folder",
        settings=HuggingFaceSettings,
        where="pass hf:NAME of a data set on the hub, or hf:PATH of a file or folder",
        own=True,
        recipe=OWN,
    )


DATASETS.add_family(HUGGING_FACE, _family)
