"""What a training run found, and the folder that keeps it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastsam.longtail.atomic import write_text
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.metrics import Metrics


@dataclass(frozen=True)
class Epoch:
    """One epoch of training.

    Attributes:
        epoch: counted from 1.
        lr: learning rate.
        rho: radius of the ascent step; None where the optimizer has none.
        loss: mean training loss at the weights before each step (not at the perturbed ones).
        train_accuracy: percent right at the same weights, under augmentation.
        validation_accuracy: percent right after the epoch, with the post-hoc adjustment if the run
            has one; None without a validation set.
        seconds: wall time of the epoch.
        skipped: updates that were left out because a gradient was not finite.
    """

    epoch: int
    lr: float
    rho: float | None
    loss: float
    train_accuracy: float
    validation_accuracy: float | None
    seconds: float
    skipped: int = 0


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        config: settings of the run.
        sources: where each setting comes from, if it came from a recipe.
        counts: training images of each class.
        class_names: one per class.
        groups: classes of head, mid and tail.
        subset_hash: SHA-256 of the training subset.
        rule: which epoch the metrics are of.
        test: metrics on the test set.
        validation: metrics on the validation set, where there is one.
        history: every epoch.
        seconds: wall time of all epochs.
        unreadable: images that could not be read and were skipped, with how often.
        environment: versions and device.
        unseen: metrics on a second test set of other kinds of images, where there is one.
        contents: SHA-256 of contents and classes of every split.
        steps_per_epoch: batches of an epoch.
    """

    config: dict[str, Any]
    sources: dict[str, str]
    counts: list[int]
    class_names: list[str]
    groups: dict[str, list[int]]
    subset_hash: str | None
    rule: str
    test: Metrics
    validation: Metrics | None
    history: list[Epoch]
    seconds: float
    unreadable: dict[str, int]
    environment: dict[str, Any]
    unseen: Metrics | None = None
    contents: dict[str, str] = field(default_factory=dict)
    steps_per_epoch: int | None = None

    def to_json(self) -> str:
        """The whole result as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The inverse of :meth:`to_json`.

        Raises:
            DataError: if the text is not such a result.
        """
        try:
            values = json.loads(text)
            values["test"] = Metrics(**values["test"])
            for name in ("validation", "unseen"):
                if values.get(name) is not None:
                    values[name] = Metrics(**values[name])
            values["history"] = [Epoch(**record) for record in values["history"]]
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"not a result of `fastsam train`: {error}") from error


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


class RunFolder:
    """The files of one run.

    Attributes:
        checkpoint: state after the last completed epoch that was written.
        result: the :class:`Result` as JSON.
        history: one line per epoch, CSV.
        per_class: one line per class, CSV.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.result = path / "result.json"
        self.history = path / "history.csv"
        self.per_class = path / "per_class.csv"

    def kept(self, epoch: int) -> Path:
        """Where the checkpoint of an epoch lies that was asked to be kept."""
        return self.path / f"epoch-{epoch}.pt"

    def check(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make sure that nothing of value is in the way.

        Args:
            resume: the folder holds a run to go on with.
            overwrite: the files of a previous run may be removed.

        Raises:
            UsageError: if the folder is not empty and neither flag is given, or both are.
        """
        if resume and overwrite:
            raise UsageError("choose one of --resume and --overwrite")
        check_free(self.path, allowed=resume or overwrite, flags="--resume or --overwrite")

    def prepare(self, *, overwrite: bool = False) -> None:
        """Create the folder.

        Args:
            overwrite: remove what a previous run wrote, and the spectra of its weights in the
                folder or in ``spectra`` below it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            left = ("epoch-*.pt", "tensorboard/events.*")
            spectra = ("class-*.json", "spectra.svg", "spectra/class-*.json", "spectra/spectra.svg")
            old = [file for pattern in left + spectra for file in self.path.glob(pattern)]
            for file in (self.checkpoint, self.result, self.history, self.per_class, *old):
                file.unlink(missing_ok=True)

    def write(self, result: Result) -> None:
        """Write the result as JSON and as two CSV tables, each atomically."""
        write_text(self.result, result.to_json())
        self.write_history(result.history)
        group_of = {label: name for name, members in result.groups.items() for label in members}
        classes = [
            (label, name, group_of.get(label, ""), result.counts[label], share)
            for label, (name, share) in enumerate(
                zip(result.class_names, result.test.per_class, strict=True)
            )
        ]
        header = ("class", "name", "group", "training_images", "test_accuracy")
        write_text(self.per_class, _csv(header, classes))

    def write_history(self, history: Sequence[Epoch]) -> None:
        """Write the epochs so far as a CSV table, atomically."""
        names = list(Epoch.__dataclass_fields__)
        rows = [[getattr(epoch, name) for name in names] for epoch in history]
        write_text(self.history, _csv(names, rows))


def check_free(path: Path, *, allowed: bool, flags: str) -> None:
    """Raise :class:`UsageError` if ``path`` is a file, or a folder with content and not allowed."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --out needs a folder")
    if not allowed and path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty; choose another --out, or {flags}")
