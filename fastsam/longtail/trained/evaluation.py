"""Evaluation of a trained run: scores and intervals for a given test distribution."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsam import files
from fastsam.longtail.classes import TargetPrior, target_prior
from fastsam.longtail.data import Images, LongTailData
from fastsam.longtail.data.preprocessing import Views
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.metrics import Metrics, evaluate
from fastsam.longtail.precision import float32_products
from fastsam.longtail.predictions import Predictions, predict
from fastsam.longtail.scores import Scorer, intervals
from fastsam.longtail.trained.run import TrainedRun
from fastsam.records import build
from fastsam.threads import cpu_threads

SEED = 0
"""Seed of the bootstrap."""
FEWEST = 20
"""Smallest number of bootstrap samples for meaningful quantiles."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run on one dataset split.

    Attributes:
        data: name of the data set.
        split: ``train``, ``validation`` or ``test``.
        prior: test distribution of the classes; see :func:`fastsam.longtail.classes.target_prior`.
        epoch: number of epochs after which the weights were saved.
        rule: description of the weights; see :attr:`fastsam.longtail.Result.rule`.
        calibration: calibrator, parameters and temperature; ``none`` without a calibration.
        metrics: the scores.
        intervals: bootstrap interval of each score; empty if none were requested. They cover the choice of
            images only; runs with other seeds vary more.
        level: confidence level of the intervals.
        bootstrap: number of bootstrap samples.
        class_names: one name per class.
        counts: training images of each class.
        groups: classes of head, mid and tail, by rank of the training count.
        unreadable: names of unreadable images that were skipped, with how often.
        views: number of crops of each image whose logits were averaged.
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
    views: int = 1

    @property
    def scores(self) -> dict[str, float]:
        """Scores by name, in the order of tables."""
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
        """Load a file written by :meth:`save`.

        Raises:
            DataError: if the file is not an evaluation, or was damaged or edited.
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
    views: Views = 1,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a trained run.

    Args:
        run: the run.
        data: data set with the classes of the run; None for the data set of the run.
        split: ``train``, ``validation`` or ``test``; training images are read without augmentation.
        prior: test distribution of the classes: ``as-is``, ``uniform``, ``trained`` or ``reversed``; see
            :func:`fastsam.longtail.classes.target_prior`.
        bootstrap: number of bootstrap samples, at least 20; 0 for no intervals.
        level: confidence level of the intervals, at least 0.5 and below 1.
        batch_size: images per batch; None for the batch size of the run.
        views: number of crops of each image file whose logits are averaged: 1, or 5 for the center and the
            corners of a larger image; see :meth:`fastsam.longtail.data.Preprocessing.with_views`.
        progress: show progress while data are loaded.

    Raises:
        UsageError: if an option is not valid, or ``data`` has other classes or channels than the run.
        DataError: if data are missing or damaged.
        CheckpointError: if the data set of the run has changed.

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
            f"bootstrap must be 0 (no intervals) or at least {FEWEST}, got {bootstrap}"
        )
    if not 0.5 <= level < 1:
        raise UsageError(f"level must be at least 0.5 and below 1 (0.95 for 95 %), got {level:g}")
    shares = target_prior(prior, run.counts)
    if data is None:
        data = run.data(progress=progress)
        run.checkpoint.check_data(data)
    data = data.for_run()  # a copy whose counts of unreadable images start at 0
    images = data.split(split)
    with cpu_threads(run.checkpoint.config.threads), closing(data):
        predictions = _predictions(run, data, images, batch_size, views)
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
        views=views,
    )
    if bootstrap == 0:
        return evaluation
    scorer = Scorer(predictions, len(run.counts), run.groups, shares)
    found = intervals(scorer, samples=bootstrap, level=level, seed=SEED)
    return replace(evaluation, intervals={name: list(bounds) for name, bounds in found.items()})


def _predictions(
    run: TrainedRun, data: LongTailData, images: Images, batch_size: int | None, views: Views
) -> Predictions:
    """Compute predictions for images of a data set that may order the classes differently."""
    labels = _labels(run, data)
    if run.preprocessing is not None:  # another data set may have another preprocessing
        images = images.prepared_as(run.preprocessing.with_views(views))
    elif views > 1:
        run.known_preprocessing()  # raises the error
    if images.channels != run.checkpoint.channels:
        raise UsageError(
            f"the run requires images with {run.checkpoint.channels} channels, but those of {data.name} "
            f"have {images.channels}; choose another data set"
        )
    config = run.checkpoint.config
    with float32_products(config.tf32, run.device):
        return predict(
            run.network,
            images,
            run.device,
            batch_size=batch_size or config.batch_size,
            labels=labels,
            precision=config.precision,
        )


def _labels(run: TrainedRun, data: LongTailData) -> NDArray[np.int64]:
    """Return the run's label of each class of ``data``.

    Raises:
        UsageError: if the class names differ.
    """
    here = {name: label for label, name in enumerate(run.class_names)}
    there = set(data.class_names)
    if there != set(here) or len(here) != len(run.class_names):
        names = sorted(there ^ set(here))
        shown = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
        raise UsageError(
            f"{data.name} must have the {len(here)} classes of the run, but has {data.num_classes} classes "
            f"that differ in {shown}; rename its classes or choose another data set"
        )
    return np.array([here[name] for name in data.class_names], dtype=np.int64)
