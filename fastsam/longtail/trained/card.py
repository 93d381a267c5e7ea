"""The model card of an exported run, in the format of the Hugging Face Hub."""

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
"""Largest number of classes for which the card lists all of them."""
_ENDS = 5
"""Number of largest, and of smallest, classes that the card lists otherwise."""
_SETTINGS = (
    *("epochs", "batch_size", "lr", "lr_schedule", "weight_decay", "rho", "defer_epoch"),
    *("posthoc_tau", "imbalance", "kind", "subset_seed", "seed", "precision"),
)
"""Settings that the card lists if the run has them."""


_LIBRARY = 'library_name: "fastsam"'


def is_card(text: str) -> bool:
    """Return whether text is a model card written by :func:`model_card`."""
    return text.startswith("---\n") and _LIBRARY in text


def model_card(run: TrainedRun, *, file: str, usage: str) -> str:
    """Write the model card of a run: YAML front matter, then Markdown.

    Accuracies come from the run's ``result.json`` if it belongs to these weights. The card of a calibrated
    run has no accuracies, because the result does not apply to it.

    Args:
        run: the trained run.
        file: name of the model file.
        usage: Markdown that describes the content of the file and how to load it.

    Raises:
        DataError: if ``result.json`` is damaged.
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
    """Load the result of these weights; return None if there is none."""
    if run.calibration is not None:
        return None
    path = RunFolder(run.path if run.path.is_dir() else run.path.parent).result
    if not path.is_file():
        return None
    result = Result.load(path)
    # The history differs if the checkpoint is of an earlier epoch, or the run has been continued.
    return result if result.history == run.checkpoint.history else None


def _front_matter(title: str, data: str, result: Result | None) -> str:
    """Return the front matter as YAML. Values are written as JSON, which is valid YAML for any string."""
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
        return "The preprocessing of image files is unknown: the training data were created in Python.\n"
    height, width = preprocessing.size
    color = "RGB" if preprocessing.channels == 3 else "grayscale (ITU-R 601 luma)"
    turned = (
        "rotate it by its EXIF orientation"
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
        else "divide 8-bit values by 255; in images with more bits, map "
        f"{preprocessing.value_range[0]:g} to 0 and {preprocessing.value_range[1]:g} to 1"
    )
    mean, std = (", ".join(map(str, values)) for values in (preprocessing.mean, preprocessing.std))
    return (
        f"Decode the image as {color}, {turned}, {scaled}, {white}. Resizing is bilinear with "
        f"antialiasing. The channels have mean {mean} and standard deviation {std}.\n"
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
            "Not available: the run was evaluated before it was calibrated. `fastsam evaluate` computes the "
            "scores of the calibrated network.\n"
        )
    if result is None:
        return "Not available: the run has no result for these weights.\n"
    shares = {"all": result.test.accuracy, **result.test.groups}
    rows = [(name, f"{share:.2f}") for name, share in shares.items()]
    return _table((f"classes ({result.test.images:,} test images)", "accuracy in percent"), rows)


def _classes(run: TrainedRun, result: Result | None) -> str:
    """Return a table of all classes, or of the largest and smallest if there are too many."""
    labels = list(range(len(run.class_names)))
    said = "`labels.json` lists the class names in the order of the labels.\n"
    if len(labels) > MOST_CLASSES:
        order = np.argsort(-run.counts, kind="stable").tolist()
        labels = [*order[:_ENDS], *order[-_ENDS:]]
        said = (
            f"The table shows the {_ENDS} largest and the {_ENDS} smallest of "
            f"{len(run.class_names):,} classes. {said}"
        )
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
        "the smallest. Rare classes are recognized less reliably.\n"
    )
    shares = {} if result is None else result.test.groups
    if "head" in shares and "tail" in shares:
        text += (
            f"- Test accuracy is {shares['head']:.2f} percent on head classes and "
            f"{shares['tail']:.2f} percent on tail classes; the overall accuracy does not show this "
            "difference.\n"
        )
    return (
        text
        + "- The model assigns one of the classes to every image, even if the image shows something else. "
        "Evaluate the model on your own data before use.\n"
    )


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_text, line))} |\n" for line in lines)


def _text(value: object) -> str:
    """Escape a value for Markdown and put it on one line."""
    line = " ".join(printable(str(value)).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", line) if line != "---" else line
