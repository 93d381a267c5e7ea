"""Results of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastsam import files
from fastsam.curvature import CurvaturePoint
from fastsam.html_table import html_table
from fastsam.longtail.errors import DataError
from fastsam.longtail.metrics import Metrics
from fastsam.longtail.origin import Origin
from fastsam.records import build


@dataclass(frozen=True)
class Epoch:
    """Record of one epoch of training.

    Attributes:
        epoch: epoch, counted from 1.
        lr: learning rate.
        rho: radius of the ascent step; None for optimizers without an ascent step.
        loss: mean training loss at the weights before each step (not at the perturbed weights). If the ascent
            uses a sample of the batch (``ascent_share`` below 1, or ``ascent_sample`` weighted), it is the
            loss of the whole batch at the perturbed weights. With ``ascent_scope`` local it is the mean over
            the ranks' losses, each divided by the rank's sum of class weights.
        train_accuracy: training accuracy at the same weights, in percent, with augmentation.
        validation_accuracy: validation accuracy after the epoch, in percent, of the averaged weights in runs
            with ``ema`` and with the post-hoc adjustment if the run has one; None without a validation set,
            and after epochs without validation (``validate_every``).
        seconds: wall time of the epoch.
        skipped: number of updates that were skipped because a gradient was infinite or NaN.
        gradients: cost in forward-backward passes over whole batches; None in runs of older versions, as are
            all attributes below.
        gradients_per_step: ``gradients`` by the number of steps; 2 for SAM.
        validation_balanced: balanced accuracy in percent, where ``validation_accuracy`` is overall accuracy.
        images_per_second: training images of all processes per second of training, without evaluation and
            compilation.
        waiting: share of the training time in which the first process waited for its next batch, from 0 to 1.
        memory: largest memory of the first process since it began, in MiB: what PyTorch had allocated on the
            GPU, or the resident memory on a CPU. None where the system does not say.
        compile_seconds: time of compilations in this epoch; None in runs without ``compile``.
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
    gradients_per_step: float | None = None
    validation_balanced: float | None = None
    images_per_second: float | None = field(default=None, compare=False)
    waiting: float | None = field(default=None, compare=False)
    memory: float | None = field(default=None, compare=False)
    compile_seconds: float | None = field(default=None, compare=False)


def best_epoch(history: Sequence[Epoch]) -> int:
    """Return the epoch with the highest balanced accuracy on validation; of equal ones the first.

    Before any validation it is the first epoch. A run that an older version began recorded overall accuracy
    alone, and keeps that criterion.
    """
    validated = [record for record in history if record.validation_accuracy is not None]
    if not validated:
        return history[0].epoch
    older = any(record.validation_balanced is None for record in validated)
    name = "validation_accuracy" if older else "validation_balanced"
    return max(validated, key=lambda record: getattr(record, name)).epoch


def judged_rule(
    history: Sequence[Epoch],
    *,
    selects: bool,
    decay: float | None,
    parent: Mapping[str, Any] | None,
) -> str:
    """Describe the weights that a run evaluates.

    Args:
        history: records of all epochs so far.
        selects: whether the run evaluates the best epoch on validation instead of the last one.
        decay: decay of the average of the weights; None without averaging.
        parent: record of the run from which this one branched off, which may average differently.
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
    """The result of a run.

    Attributes:
        config: settings of the run.
        sources: source of each setting, by name.
        counts: training images of each class.
        class_names: one name per class.
        groups: classes of head, mid and tail.
        subset_hash: SHA-256 of the training subset.
        rule: description of the evaluated weights: their epoch, and whether they are an average.
        test: metrics on the test set.
        validation: metrics on the validation set; None without one.
        history: records of all epochs.
        seconds: wall time of all epochs.
        unreadable: names of unreadable images that were skipped, with how often.
        environment: versions and device.
        contents: SHA-256 of images and labels of every split, and of the class names.
        steps_per_epoch: batches per epoch.
        parent: run and epoch from which this run branched off; None for other runs.
        start: weights that the run started from, with their SHA-256; None for random initial weights.
        origin: date, command, version and commit; None in results of older versions.
        curvature: measurements of ``track_curvature``; the steps count batches from the start of training.
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
    start: dict[str, Any] | None = None
    origin: Origin | None = None
    curvature: list[CurvaturePoint] = field(default_factory=list)

    @property
    def gradients(self) -> float | None:
        """Cost of the training in forward-backward passes over whole batches; None if unknown.

        A run in several stages has that of its last stage; see :attr:`total_gradients`.
        """
        costs = [record.gradients for record in self.history]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def earlier_stages(self) -> list[dict[str, Any]]:
        """Name, method, optimizer, epochs, ``gradients`` and ``seconds`` of the stages before this one."""
        return list((self.start or {}).get("stages", ()))

    @property
    def total_gradients(self) -> float | None:
        """Cost of all stages in forward-backward passes over whole batches; None if unknown."""
        costs = [*(stage["gradients"] for stage in self.earlier_stages), self.gradients]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    def to_json(self) -> str:
        """Convert the result to JSON with a checksum."""
        return files.to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Create a result from the output of :meth:`to_json`.

        Raises:
            DataError: if the text is not a result, or was damaged or edited.
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
        """Load a ``result.json``.

        Raises:
            DataError: if the file is not a result, or was damaged or edited.
        """
        try:
            return cls.from_json(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    def _repr_html_(self) -> str:
        """Return the main metrics on the test set as an HTML table, for notebooks."""
        test = self.test
        worst = self.class_names[int(np.nanargmin(np.array(test.per_class, dtype=np.float64)))]
        rows: list[tuple[str, str | float | None, str]] = [
            ("accuracy", test.accuracy, "%"),
            ("balanced accuracy", test.balanced, "%"),
            *((name, accuracy, "%") for name, accuracy in test.groups.items()),
            ("worst class", test.worst_class, f"% ({worst})"),
            ("negative log-likelihood", test.nll, "nats"),
            ("expected calibration error", test.ece, "%"),
            ("cost", self.total_gradients, "gradients of a batch"),
            *((name, self.config[name], "") for name in ("data", "method", "optimizer")),
            ("weights", self.rule, ""),
        ]
        return html_table(("test set", "value", "unit"), rows)

    def _check(self) -> None:
        """Raise ValueError if the fields contradict each other."""
        classes = len(self.counts)
        if not classes == len(self.class_names) == len(self.test.per_class):
            raise ValueError(
                f"expected as many class names and accuracies as the {classes} counts, got "
                f"{len(self.class_names)} and {len(self.test.per_class)}"
            )
        if any(not 0 <= label < classes for labels in self.groups.values() for label in labels):
            raise ValueError(
                f"expected labels from 0 to {classes - 1} in groups, got {self.groups}"
            )
        for name in ("data", "method", "optimizer"):
            if not isinstance(self.config.get(name), str):
                raise ValueError(f"config has no {name}")
