"""Predictions of image files as CSV or JSON text, written image by image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from fastsam.csv_text import csv_line
from fastsam.longtail.errors import UsageError
from fastsam.longtail.trained.prediction import FilePrediction

Writer = Callable[[Iterable[FilePrediction], Sequence[str], int | None], Iterator[str]]
"""A function of predictions, class names and a number of classes that yields parts of the text."""

_FIRST_COLUMNS = ("path", "class", "probability")


def csv_parts(
    predictions: Iterable[FilePrediction], class_names: Sequence[str], top: int | None = None
) -> Iterator[str]:
    """Yield a CSV table with one line per image.

    The columns are ``path``, ``class`` and ``probability`` of the most probable class, followed by one column
    with the probability of each class, named after the class. With ``top``, the other columns are instead
    ``class_2``, ``probability_2`` and so on for the ``top`` most probable classes.

    Args:
        predictions: the predictions.
        class_names: one name per class.
        top: number of classes; None for all classes.

    Raises:
        UsageError: if ``top`` is out of range.
    """
    _check_top(top, class_names)
    places = range(2, (top or 1) + 1)
    ranked = [f"{what}_{place}" for place in places for what in _FIRST_COLUMNS[1:]]
    more = distinct_names(class_names, _FIRST_COLUMNS) if top is None else ranked
    before = csv_line([*_FIRST_COLUMNS, *more])  # held back: the first image may be an error
    for item in predictions:
        cells: list[object] = [str(item.path)]
        for label in item.top(top or 1):
            cells += [class_names[label], _number(item.probabilities[label])]
        if top is None:
            cells += map(_number, item.probabilities)
        yield before + csv_line(cells)
        before = ""
    if before:
        yield before


def json_parts(
    predictions: Iterable[FilePrediction], class_names: Sequence[str], top: int | None = None
) -> Iterator[str]:
    """Yield a JSON list with one object per image.

    An object has ``path``, the ``label``, ``class`` and ``probability`` of the most probable class, and
    ``probabilities``, which maps class names to probabilities: of all classes in the order of labels, or of
    the ``top`` most probable classes, most probable first.

    Args:
        predictions: the predictions.
        class_names: one name per class.
        top: number of classes; None for all classes.

    Raises:
        UsageError: if ``top`` is out of range.
    """
    _check_top(top, class_names)
    names = distinct_names(class_names)
    before = "[\n"
    for item in predictions:
        labels = range(len(names)) if top is None else item.top(top)
        document = {
            "path": str(item.path),
            "label": item.label,
            "class": class_names[item.label],
            "probability": _number(item.probabilities[item.label]),
            "probabilities": {names[k]: _number(item.probabilities[k]) for k in labels},
        }
        yield before + json.dumps(document)
        before = ",\n"
    yield "\n]\n" if before == ",\n" else "[]\n"


WRITERS: dict[str, Writer] = {"csv": csv_parts, "json": json_parts}
"""Writers of predictions by name of the format."""


def distinct_names(class_names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Return distinct class names: a name that occurs twice, or is taken, gets the label appended.

    Args:
        class_names: one name per class.
        taken: names that must not be used.

    Example:
        >>> distinct_names(["cat", "dog", "cat", "path"], taken=["path"])
        ['cat (class 0)', 'dog', 'cat (class 2)', 'path (class 3)']
    """
    counts = Counter([*class_names, *taken])
    return [
        f"{name} (class {label})" if counts[name] > 1 else name
        for label, name in enumerate(class_names)
    ]


def _check_top(top: int | None, class_names: Sequence[str]) -> None:
    if top is not None and not 1 <= top <= len(class_names):
        raise UsageError(
            f"top must be at least 1 and at most {len(class_names)}, the number of classes, got {top}"
        )


def _number(value: np.float32) -> float:
    """Convert a float32 to the shortest decimal that rounds to it."""
    return float(str(value))
