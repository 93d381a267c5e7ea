"""Evaluation of a trained run: every score with its interval, for a stated test distribution."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsam import files
from fastsam.longtail.classes import TargetPrior, target_prior
from fastsam.longtail.data import Images, LongTailData
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.metrics import Metrics, evaluate
from fastsam.longtail.predictions import Predictions, predict
from fastsam.longtail.scores import Scorer, intervals
from fastsam.longtail.trained.run import TrainedRun
from fastsam.records import build
from fastsam.threads import cpu_threads

SEED = 0
"""Seed of the bootstrap."""
FEWEST = 20
"""Bootstrap samples below which quantiles mean nothing."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of one run on one set of images.

    Attributes:
        data: name of the data set.
        split: ``train``, ``validation`` or ``test``.
        prior: test distribution of the classes; see :func:`fastsam.longtail.classes.target_prior`.
        epoch: epochs of training behind the weights.
        rule: which weights of the run they are, as in :attr:`fastsam.longtail.Result.rule`.
        calibration: calibrator, parameters and temperature that were applied; ``none`` without a calibration.
        metrics: the scores.
        intervals: bootstrap interval of each score, of the images alone: the training has another, larger
            spread. Empty where none was asked for.
        level: share of the bootstrap samples inside an interval.
        bootstrap: number of bootstrap samples.
        class_names: one per class.
        counts: training images of each class.
        groups: classes of head, mid and tail, by rank of the training count.
        unreadable: images that could not be read and were skipped.
    """

    data: str
    split: str
    prior: str
    epoch: int
    rule: str
    calibration: str
    metrics: Metrics
    intervals: dict[str, list[float]]
    level: float
    bootstrap: int
    class_names: list[str]
    counts: list[int]
    groups: dict[str, list[int]]
    unreadable: dict[str, int] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """Every score by name, in the order in which they are shown."""
        metrics = self.metrics
        named = {
            "accuracy": metrics.accuracy,
            "balanced": metrics.balanced,
            **metrics.groups,
            "harmonic_mean": metrics.harmonic_mean,
            "worst_class": metrics.worst_class,
            "top5": metrics.top5,
            "macro_f1": metrics.macro_f1,
            "nll": metrics.nll,
            "ece": metrics.ece,
        }
        return {name: value for name, value in named.items() if value is not None}

    def save(self, path: str | Path) -> None:
        """Write JSON with a checksum."""
        files.write_text(Path(path), files.to_json(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is something else, or was damaged or edited.
        """
        try:
            return build(cls, files.from_json(Path(path).read_text("utf-8")))
        except ValueError as error:
            raise DataError(f"{path} is not an evaluation: {error}") from error


def evaluate_run(
    run: TrainedRun,
    *,
    data: LongTailData | None = None,
    split: str = "test",
    prior: TargetPrior = "as-is",
    bootstrap: int = 1000,
    level: float = 0.95,
    batch_size: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a trained run.

    Args:
        run: the run.
        data: images of the same classes; by default the data set that the run was trained on.
        split: ``train``, ``validation`` or ``test``; training images are read without augmentation.
        prior: test distribution of the classes: ``as-is``, ``uniform``, ``trained`` or ``reversed``.
        bootstrap: bootstrap samples for the intervals; 0 for no intervals.
        level: share of the bootstrap samples inside an interval.
        batch_size: images in a batch; by default that of the training.
        progress: show progress while data are loaded.

    Raises:
        UsageError: an option is not valid, or ``data`` has other classes or channels than the run.
        DataError: the data are missing or damaged.
        CheckpointError: the data set is not the one that the run was trained on.

    Example:
        >>> import tempfile
        >>> from fastsam.longtail import Trainer, recipe
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = Trainer(recipe("digits-lt", "ce", "sgd", epochs=1).config(), out=folder).fit()
        >>> evaluation = evaluate_run(TrainedRun.load(folder), bootstrap=20)
        >>> low, high = evaluation.intervals["accuracy"]
        >>> low <= evaluation.metrics.accuracy <= high
        True
    """
    if bootstrap != 0 and bootstrap < FEWEST:
        raise UsageError(
            f"bootstrap must be 0, for no intervals, or at least {FEWEST} samples, got {bootstrap}"
        )
    if not 0.5 <= level < 1:
        raise UsageError(f"level must be at least 0.5 and below 1 (0.95 for 95 %), got {level:g}")
    shares = target_prior(prior, run.counts)
    if data is None:
        data = run.data(progress=progress)
        run.checkpoint.check_data(data)
    data = data.for_run()  # its counts of unreadable images begin at 0
    images = data.split(split)
    with cpu_threads(run.checkpoint.config.threads), closing(data):
        predictions = _predictions(run, data, images, batch_size)
    evaluation = Evaluation(
        data=data.name,
        split=split,
        prior=prior,
        epoch=run.checkpoint.judged_epoch,
        rule=run.checkpoint.rule,
        calibration="none" if run.calibration is None else run.calibration.described,
        metrics=evaluate(predictions, run.groups, run.counts, prior=shares),
        intervals={},
        level=level,
        bootstrap=bootstrap,
        class_names=list(run.class_names),
        counts=run.counts.tolist(),
        groups=run.checkpoint.groups,
        unreadable=dict(images.unreadable),
    )
    if bootstrap == 0:
        return evaluation
    scorer = Scorer(predictions, len(run.counts), run.groups, shares)
    found = intervals(scorer, samples=bootstrap, level=level, seed=SEED)
    return replace(evaluation, intervals={name: list(bounds) for name, bounds in found.items()})


def _predictions(
    run: TrainedRun, data: LongTailData, images: Images, batch_size: int | None
) -> Predictions:
    """Predictions for images whose classes may be numbered in another order than the run's."""
    labels = _labels(run, data)
    if run.preprocessing is not None:  # another set may be read in another way
        images = images.prepared_as(run.preprocessing)
    if images.channels != run.checkpoint.channels:
        raise UsageError(
            f"the images of {data.name} have {images.channels} channels, the run has "
            f"{run.checkpoint.channels}; evaluate the run on images with as many channels"
        )
    config = run.checkpoint.config
    return predict(
        run.network,
        images,
        run.device,
        batch_size=batch_size or config.batch_size,
        labels=labels,
    )


def _labels(run: TrainedRun, data: LongTailData) -> NDArray[np.int64]:
    """The run's number of each class of ``data``.

    Raises:
        UsageError: the classes are not the same.
    """
    here = {name: label for label, name in enumerate(run.class_names)}
    there = set(data.class_names)
    if there != set(here) or len(here) != len(run.class_names):
        names = sorted(there ^ set(here))
        shown = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
        raise UsageError(
            f"{data.name} has {data.num_classes} classes, the run {len(here)}, and they differ in {shown}; "
            "name the classes as in training, or evaluate on a data set that has exactly these"
        )
    return np.array([here[name] for name in data.class_names], dtype=np.int64)
