"""The model card of an exported run, in the form of the Hugging Face Hub."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import fastsam
from fastsam.longtail.data import Preprocessing
from fastsam.longtail.results import Result
from fastsam.longtail.trained.run import TrainedRun
from fastsam.longtail.training import RunFolder
from fastsam.text import printable

MOST_CLASSES = 100
"""Classes up to which the card lists every one."""
_ENDS = 5
"""Largest and smallest classes that are listed where there are more."""
_SETTINGS = (
    *("epochs", "batch_size", "lr", "lr_schedule", "weight_decay", "rho", "defer_epoch"),
    *("posthoc_tau", "imbalance", "kind", "subset_seed", "seed", "precision"),
)
"""Settings that the card lists, where the run has them."""


_LIBRARY = 'library_name: "fastsam"'


def is_card(text: str) -> bool:
    """Return whether text is a model card that :func:`model_card` wrote."""
    return text.startswith("---\n") and _LIBRARY in text


def model_card(run: TrainedRun, *, file: str, usage: str) -> str:
    """Write the model card of a run: YAML front matter, then Markdown.

    Accuracies are those of the run's ``result.json``, if it is of the same training. A calibrated run has
    other ones, so its card states none.

    Args:
        run: the trained run.
        file: name of the model file.
        usage: Markdown that says what the file holds and how to load it.

    Raises:
        DataError: ``result.json`` is damaged.
    """
    result = _result(run)
    config = run.checkpoint.config
    title = f"{config.model}, {config.method} {config.optimizer}, on {config.data}"
    parts = [
        _front_matter(title, config.data, result),
        f"# {_text(title)}\n",
        f"Image classifier for {len(run.class_names)} classes, trained on long-tailed data and exported "
        f"by fastsam {fastsam.__version__}.\n",
        f"## Load `{file}`\n",
        usage,
        "## Input\n",
        _input(run.preprocessing),
        "## Training\n",
        _table(("setting", "value"), _settings(run)),
        "## Test accuracy\n",
        _accuracy(run, result),
        "## Classes\n",
        _classes(run, result),
        "## Limits\n",
        _limits(run, result),
    ]
    return "\n".join(parts)


def _result(run: TrainedRun) -> Result | None:
    """The result that judges these weights, if there is one."""
    if run.calibration is not None:
        return None
    path = RunFolder(run.path if run.path.is_dir() else run.path.parent).result
    if not path.is_file():
        return None
    result = Result.load(path)
    # A checkpoint of an earlier epoch, or of a run that goes on, has another history.
    return result if result.history == run.checkpoint.history else None


def _front_matter(title: str, data: str, result: Result | None) -> str:
    """YAML; a JSON text is a YAML text too, so values cannot break out."""
    document: dict[str, Any] = {
        "library_name": "fastsam",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "long-tailed-recognition", "fastsam"],
    }
    if result is not None:
        shares = {"Test accuracy": result.test.accuracy} | {
            f"Test accuracy, {name}": share for name, share in result.test.groups.items()
        }
        metrics = [
            {"type": "accuracy", "name": name, "value": share}
            for name, share in shares.items()
            if math.isfinite(share)
        ]
        judged = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data},
            "metrics": metrics,
        }
        document["model-index"] = [{"name": title, "results": [judged]}]
    lines = [f"{name}: {json.dumps(value)}" for name, value in document.items()]
    return "\n".join(["---", *lines, "---\n"])


def _input(preprocessing: Preprocessing | None) -> str:
    if preprocessing is None:
        return "How an image file becomes an input is unknown: the training data were made in Python.\n"
    height, width = preprocessing.size
    color = "RGB" if preprocessing.channels == 3 else "grey (ITU-R 601 luma)"
    turned = (
        "turn it by its EXIF orientation"
        if preprocessing.exif == "transpose"
        else "ignore its EXIF orientation"
    )
    scaled = (
        f"resize both sides to {height}x{width} (height x width)"
        if preprocessing.resize is None
        else f"resize the shorter side to {preprocessing.resize}, crop {height}x{width} (height x width) "
        "from the center"
    )
    white = (
        "divide 8-bit values by 255 and 16-bit values by 65535"
        if preprocessing.value_range is None
        else "divide 8-bit values by 255; in images of more bits, "
        f"{preprocessing.value_range[0]:g} becomes 0 and {preprocessing.value_range[1]:g} becomes 1"
    )
    mean, std = (", ".join(map(str, values)) for values in (preprocessing.mean, preprocessing.std))
    return (
        f"Decode the image as {color}, {turned}, {scaled}, {white}. Resizing is bilinear with "
        f"antialiasing. The mean of the channels is {mean}, their standard deviation {std}.\n"
    )


def _settings(run: TrainedRun) -> Iterable[tuple[str, object]]:
    checkpoint = run.checkpoint
    config, values = checkpoint.config, checkpoint.config.flat()
    yield "data set", config.data
    yield "training images", f"{run.counts.sum():,}"
    yield "method", config.method
    yield "optimizer", config.optimizer
    yield "network", f"{config.model}, {config.head} head"
    for name in _SETTINGS:
        value = values.get(name)
        replaced = name == "posthoc_tau" and run.calibration is not None
        if value is not None and not replaced:
            yield name, " ".join(map(str, value)) if isinstance(value, tuple) else value
    done = f"{checkpoint.epoch} of {config.epochs} epochs"
    yield "weights", f"{checkpoint.rule}, after {done}"
    if run.calibration is not None:
        yield "calibration", run.calibration.described


def _accuracy(run: TrainedRun, result: Result | None) -> str:
    if run.calibration is not None:
        return (
            "Not stated: the calibration was chosen after the training was judged. `fastsam evaluate` gives "
            "the scores of the calibrated network.\n"
        )
    if result is None:
        return "There is no result of a finished training beside these weights.\n"
    shares = {"all": result.test.accuracy, **result.test.groups}
    rows = [(name, f"{share:.2f}") for name, share in shares.items()]
    return _table((f"classes ({result.test.images:,} test images)", "accuracy in percent"), rows)


def _classes(run: TrainedRun, result: Result | None) -> str:
    """Every class, or where there are too many the largest and the smallest."""
    labels = list(range(len(run.class_names)))
    said = "`labels.json` has the names in the order of the labels.\n"
    if len(labels) > MOST_CLASSES:
        order = np.argsort(-run.counts, kind="stable").tolist()
        labels = [*order[:_ENDS], *order[-_ENDS:]]
        said = f"The {_ENDS} largest and the {_ENDS} smallest of {len(run.class_names):,} classes. {said}"
    rows: list[tuple[object, ...]] = []
    for label in labels:
        row: tuple[object, ...] = (label, run.class_names[label], int(run.counts[label]))
        rows.append(row if result is None else (*row, f"{result.test.per_class[label]:.2f}"))
    header = ["label", "name", "training images"]
    if result is not None:
        header.append("test accuracy in percent")
    return f"{said}\n{_table(header, rows)}"


def _limits(run: TrainedRun, result: Result | None) -> str:
    largest, smallest = int(run.counts.max()), int(run.counts.min())
    text = (
        f"- The training data are long-tailed: {largest:,} images of the largest class, {smallest:,} of "
        "the smallest. Rare classes are recognized less reliably, and their accuracies rest on few "
        "training images.\n"
    )
    shares = {} if result is None else result.test.groups
    if "head" in shares and "tail" in shares:
        text += (
            f"- Test accuracy is {shares['head']:.2f} percent on head classes and "
            f"{shares['tail']:.2f} percent on tail classes; the accuracy on all classes hides the "
            "difference.\n"
        )
    return (
        text
        + "- Every image gets one of the classes, also an image of something else. Judge the model on "
        "your own data before use.\n"
    )


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_text, line))} |\n" for line in lines)


def _text(value: object) -> str:
    """Text that Markdown takes for nothing else, in one line."""
    line = " ".join(printable(str(value)).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", line) if line != "---" else line
