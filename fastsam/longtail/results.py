"""What a training run found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastsam import files
from fastsam.longtail.errors import DataError
from fastsam.longtail.metrics import Metrics
from fastsam.longtail.origin import Origin
from fastsam.records import build


@dataclass(frozen=True)
class Epoch:
    """One epoch of training.

    Attributes:
        epoch: counted from 1.
        lr: learning rate.
        rho: radius of the ascent step; None where the optimizer has none.
        loss: mean training loss at the weights before each step (not at the perturbed ones). In a step
            whose ascent reads a sample of the batch (``ascent_share`` below 1, or ``ascent_sample`` weighted)
            it is that of the whole batch at the perturbed weights; with ``ascent_scope`` local the mean of
            the losses of all processes, each divided by its own class weights.
        train_accuracy: percent right at the same weights, under augmentation.
        validation_accuracy: percent right after the epoch of the weights that are judged (the average in runs
            with ``ema``), with the post-hoc adjustment if the run has one; None without a validation set, and
            after epochs that ``validate_every`` leaves out.
        seconds: wall time of the epoch.
        skipped: updates that were left out because a gradient was not finite.
        gradients: cost: forward and backward passes over whole batches; None in runs of older
            versions.
    """

    epoch: int
    lr: float
    rho: float | None
    loss: float
    train_accuracy: float
    validation_accuracy: float | None
    seconds: float
    skipped: int = 0
    gradients: float | None = None


def best_epoch(history: Sequence[Epoch]) -> int:
    """Return the first epoch of the highest validation accuracy, among those that have one."""
    return max(history, key=lambda record: record.validation_accuracy or 0.0).epoch


def judged_rule(
    history: Sequence[Epoch],
    *,
    selects: bool,
    decay: float | None,
    parent: Mapping[str, Any] | None,
) -> str:
    """Describe the weights that a run judges.

    Args:
        history: every epoch so far.
        selects: whether the best epoch on validation is judged, else the last one.
        decay: decay of the average of the weights; None without one.
        parent: the record of the run that this one branches from, which may have judged other weights.
    """
    rule = "last epoch"
    if selects:
        epoch = best_epoch(history)
        rule = f"best epoch on validation ({epoch})"
        if parent is not None and epoch <= parent["epoch"]:
            decay = parent["config"].get("ema")
    return rule if not decay else f"{rule} of the weights averaged with decay {decay:g}"


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
        rule: which weights the metrics are of: of which epoch, and whether they are an average.
        test: metrics on the test set.
        validation: metrics on the validation set, where there is one.
        history: every epoch.
        seconds: wall time of all epochs.
        unreadable: images that could not be read and were skipped, with how often.
        environment: versions and device.
        contents: SHA-256 of contents and classes of every split.
        steps_per_epoch: batches of an epoch.
        parent: the run that this one continues, and from which epoch; None for a run of its own.
        origin: date, command and version; None in results of older versions.
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
    contents: dict[str, str] = field(default_factory=dict)
    steps_per_epoch: int | None = None
    parent: dict[str, Any] | None = None
    origin: Origin | None = None

    @property
    def gradients(self) -> float | None:
        """Cost of the training: forward and backward passes over whole batches; None if unknown."""
        costs = [record.gradients for record in self.history]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    def to_json(self) -> str:
        """The whole result as JSON text with a checksum."""
        return files.to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The inverse of :meth:`to_json`.

        Raises:
            DataError: if the text is not such a result, or was damaged or edited.
        """
        try:
            values = files.from_json(text)
            values.pop("unseen", None)  # metrics on a second test set, which older versions wrote
            result = build(cls, values)
            result._check()
        except ValueError as error:
            raise DataError(f"not a result of `fastsam train`: {error}") from error
        return result

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a ``result.json``.

        Raises:
            DataError: if the file is something else, or was damaged or edited; it is named.
        """
        try:
            return cls.from_json(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    def _check(self) -> None:
        """Raise ValueError if the fields contradict each other."""
        classes = len(self.counts)
        if not classes == len(self.class_names) == len(self.test.per_class):
            raise ValueError(
                f"{classes} counts, {len(self.class_names)} class names, "
                f"{len(self.test.per_class)} accuracies"
            )
        if any(not 0 <= label < classes for labels in self.groups.values() for label in labels):
            raise ValueError(f"groups have classes other than 0 to {classes - 1}")
        for name in ("data", "method", "optimizer"):
            if not isinstance(self.config.get(name), str):
                raise ValueError(f"its config has no {name}")
