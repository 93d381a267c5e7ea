"""The user's own images, listed in a CSV file with one row for each image."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.catalog import DataSetPart, register_dataset
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.own_set import OwnImages, named_classes
from fastsam.longtail.data.own_settings import OwnFileSettings, TableSettings
from fastsam.longtail.data.shared_recipes import OWN
from fastsam.longtail.errors import DataError, suggestion
from fastsam.longtail.settings import setting

_DELIMITERS = (",", ";", "\t")
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
"""Parts by the values of the column of splits, in lower case."""


@dataclass(frozen=True, kw_only=True)
class CSVSettings(TableSettings, OwnFileSettings):
    """Settings of a CSV file of the user's own images."""

    csv_file: str = setting("CSV file, relative to data_root", default="images.csv")
    path_column: str = setting(
        "column of the paths of the images, relative to data_root", default="path"
    )
    split_column: str | None = setting(
        "column of the parts, with the values train, val and test",
        optional=True,
        default_text="split, if there is such a column",
    )


def load_csv(settings: CSVSettings, progress: bool = False) -> LongTailData:
    """Load the images of a CSV file.

    The first line names the columns. Values are separated by commas, semicolons or tabs.

    Raises:
        DataError: if the file or a column is missing, two columns have the same name, a row has more values
            than there are columns, or a value is empty or unknown; the message names the line.
    """
    path = settings.root / settings.csv_file
    label = settings.label_column or "label"
    wanted = {"--path-column": settings.path_column, "--label-column": label}
    if settings.split_column is not None:
        wanted["--split-column"] = settings.split_column
    if settings.group_column is not None:
        wanted["--group-column"] = settings.group_column
    rows, split = _read(path, wanted, settings.split_column)
    names, targets = named_classes(
        [row[label] for _, row in rows], lambda place: f"{path}, line {rows[place][0]}"
    )
    parts = np.array(
        ["train" if split is None else _part(path, line, split, row[split]) for line, row in rows]
    )
    places = {part: np.flatnonzero(parts == part) for part in ("train", "test", "validation")}
    if not len(places["train"]):
        raise DataError(
            f"{path} has no row with {split} 'train'; add training images, or omit the column"
        )
    paths = [row[settings.path_column] for _, row in rows]
    every = ImageList(paths, targets)
    return OwnImages(
        "csv",
        settings.root,
        {part: every.select(chosen) for part, chosen in places.items() if len(chosen)},
        missing_test=f"add rows of {path} with 'test' in a column split",
        class_names=names,
        groups=_groups(rows, settings.group_column, places),
        group_column=settings.group_column or "",
        packed=settings.packed,
    ).load(settings, progress=progress)


_Rows = list[tuple[int, dict[str, str]]]
"""Rows with the number of their line."""


def _read(path: Path, wanted: dict[str, str], split: str | None) -> tuple[_Rows, str | None]:
    """Read the rows, and the name of the column of splits: the given one, or ``split`` if it exists.

    Values of this column and of the ``wanted`` ones are not empty.
    """
    try:
        # Spreadsheets start a file with a byte order mark, which utf-8-sig removes.
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            delimiter = max(_DELIMITERS, key=header.count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter)
            columns = [str(name).strip() for name in reader.fieldnames or ()]
            while columns and not columns[-1]:
                columns.pop()  # of a spreadsheet with empty columns; they have no values either
            reader.fieldnames = columns
            _check_distinct(path, columns)
            for option, name in wanted.items():
                if name not in columns:
                    raise DataError(
                        f"{path} has no column {name!r}{suggestion(name, columns) or ';'} it has "
                        f"{', '.join(map(repr, columns))}. Pass {option} NAME"
                    )
            split = split or ("split" if "split" in columns else None)
            needed = dict.fromkeys([*wanted.values(), *([split] if split else [])])
            rows = list(_checked(path, reader, needed))
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; pass --csv-file NAME, relative to --data-root"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}; save it again") from error
    if not rows:
        raise DataError(f"{path} lists no images; add a line for each image")
    return rows, split


def _check_distinct(path: Path, columns: list[str]) -> None:
    """Raise :class:`DataError` if two columns have the same name: one would hide the other."""
    # No setting can choose a column without a name.
    repeated = [name for name, count in Counter(columns).items() if name and count > 1]
    if repeated:
        raise DataError(
            f"{path} names column {repeated[0]!r} more than once; rename or remove one of them"
        )


def _checked(
    path: Path, reader: Any, wanted: Iterable[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Iterate over the rows that are not blank."""
    for row in reader:
        line = reader.line_num
        surplus = row.pop(None, ())
        if any(value.strip() for value in surplus):
            count = len(reader.fieldnames)
            raise DataError(
                f"{path}, line {line}: found {count + len(surplus)} values, but the header names {count} "
                f"columns; put values that contain {reader.reader.dialect.delimiter!r} in double quotes, "
                "without a space before them, or name every column"
            )
        if not any(row.values()):
            continue
        values = {name: value.strip() for name, value in row.items() if isinstance(value, str)}
        for name in wanted:
            if not values.get(name) or "\0" in values[name]:
                raise DataError(
                    f"{path}, line {line}: column {name!r} is empty; fill it in or remove the line"
                )
        yield line, values


def _part(path: Path, line: int, column: str, value: str) -> str:
    part = _SPLITS.get(value.lower())
    if part is None:
        raise DataError(
            f"{path}, line {line}: column {column!r} must be train, val or test, got {value!r}; correct it"
        )
    return part


def _groups(
    rows: _Rows, column: str | None, places: dict[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.object_]] | None:
    if column is None:
        return None
    every = np.array([row[column] for _, row in rows], dtype=object)
    return {part: every[chosen] for part, chosen in places.items()}


register_dataset(
    DataSetPart(
        name="csv",
        build=load_csv,
        summary="your own images, listed in a CSV file with the columns path and label",
        settings=CSVSettings,
        where="create images.csv with the columns path and label, and optionally split",
        own=True,
        recipe=OWN,
    )
)
