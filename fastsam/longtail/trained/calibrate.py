"""Calibration of a trained classifier on the validation images of its run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import cache

import numpy as np
from torch import Tensor

from fastsam.longtail.calibrators import CALIBRATORS, Calibrator, Parameters, TrainedHead
from fastsam.longtail.data import Images, LongTailData
from fastsam.longtail.data.long_tailed import FEWEST
from fastsam.longtail.differences import is_own
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.features import Features, collect_features
from fastsam.longtail.precision import float32_products
from fastsam.longtail.settings import settings_of
from fastsam.longtail.trained.calibration import Calibration, CalibratorScore, modules_hash
from fastsam.longtail.trained.head_scores import HeadScores
from fastsam.longtail.trained.run import TrainedRun
from fastsam.threads import cpu_threads

BEST = "best"
"""Name that selects the best of all calibrators."""
NONE = "none"
"""Name of the calibrator that changes nothing. Its score is always reported."""
_DIGITS = 9
"""Percentages that agree to this number of decimals are ties, because sums have rounding errors."""


def calibrate_run(
    run: TrainedRun,
    *,
    method: str = BEST,
    force: bool = False,
    data: LongTailData | None = None,
    progress: bool = False,
) -> Calibration:
    """Calibrate a trained classifier and fit a temperature, on the validation images of its run.

    Each calibrator has candidates, such as values of tau. The candidate with the highest balanced validation
    accuracy (mean over classes) is chosen; of equal candidates, the smallest change. Then the temperature T
    of ``softmax(logits / T)`` is fitted by minimizing the negative log-likelihood of the validation images,
    which does not change predicted classes. Test images are not read.

    Calibration starts from the trained head and the logit scale of its loss. It replaces the run's post-hoc
    adjustment (``posthoc_tau``).

    Args:
        run: the run; it is not changed. To apply the calibration, write it with :meth:`Calibration.save` to
            :func:`~fastsam.longtail.trained.calibration.calibration_path`; :meth:`TrainedRun.load` then
            loads it.
        method: name of a calibrator, or ``best`` for the best of all that can be applied to the head.
        force: accept classes with fewer than 5 validation images.
        data: the data set of the run; None to load it.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        UsageError: if the calibrator is unknown or cannot be applied to the head, or there are no
            validation images or too few of a class.
        DataError: if data are missing or damaged.
        CheckpointError: if the training or validation images are not those of the run.
        TrainingError: if a feature or logit is infinite or NaN.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from fastsam.longtail import Trainer, recipe
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = Trainer(recipe("digits-lt", "ce", "sgd", epochs=1).config(), out=folder).fit()
        >>> calibration = calibrate_run(TrainedRun.load(folder), method="logit-adjustment")
        >>> sorted(score.calibrator for score in calibration.scores)
        ['logit-adjustment', 'none']
        >>> calibration.save(folder / "calibration.json")
        >>> TrainedRun.load(folder).calibration.calibrator
        'logit-adjustment'
    """
    trained = TrainedHead(run.trained_head, run.logit_scale, run.counts)
    eligible, refused = _calibrators(method, trained)
    data = (run.data(progress=progress) if data is None else data).for_run()
    config = run.checkpoint.config
    with (
        cpu_threads(config.threads),
        float32_products(config.tf32, run.device),
        closing(data),
    ):
        validation = _validation(run, data, force=force)
        run.checkpoint.check_data(data, splits=("train", "validation"))

        def features(images: Images, name: str) -> Features:
            return collect_features(
                run.network,
                images,
                run.device,
                batch_size=config.batch_size,
                precision=config.precision,
                description=f"features of the {name} images",
                progress=progress,
            )

        @cache
        def training() -> Features:
            return features(data.train, "training")

        scores = HeadScores(features(validation, "validation"), len(run.counts), run.device)
        tried = sorted({NONE, *eligible}, key=lambda name: (CALIBRATORS[name].change, name))
        found = {
            name: _best_candidate(CALIBRATORS[name], trained, training, scores) for name in tried
        }
    # max() returns the first of equal scores, which is the smallest change.
    chosen = max(
        (name for name in tried if name in eligible),
        key=lambda name: round(found[name][1].balanced, _DIGITS),
    )
    parameters, score = found[chosen]
    return Calibration(
        calibrator=chosen,
        parameters={
            name: value.cpu().float() if isinstance(value, Tensor) else value
            for name, value in parameters.items()
        },
        temperature=1.0 if score.temperature is None else score.temperature,
        scores=tuple(score for _, score in found.values()),
        images=len(scores.features),
        weights=modules_hash(run.network.features, run.trained_head),
        refused=refused,
    )


def _calibrators(method: str, trained: TrainedHead) -> tuple[list[str], dict[str, str]]:
    """Return the names of the calibrators to choose from, and the reason for each that cannot be applied.

    Raises:
        UsageError: if the calibrator is unknown, or cannot be applied to the head.
    """
    if method != BEST:
        calibrator = CALIBRATORS.get(method)
        if calibrator is None:
            raise unknown("calibrator", method, (BEST, *CALIBRATORS.names()))
        reason = calibrator.refuses(trained)
        if reason is not None:
            raise UsageError(
                f"calibrator {method} cannot be applied to this run: {reason}; choose another one or {BEST!r}"
            )
        return [method], {}
    CALIBRATORS.names(plugins=True)
    reasons = {name: part.refuses(trained) for name, part in CALIBRATORS.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in CALIBRATORS if name not in refused], refused


def _best_candidate(
    calibrator: Calibrator,
    trained: TrainedHead,
    training: Callable[[], Features],
    scores: HeadScores,
) -> tuple[Parameters, CalibratorScore]:
    """Return the candidate with the highest balanced accuracy (of equal ones the first), and its score."""
    best: tuple[float, Parameters] | None = None
    for parameters in calibrator.candidates(trained, training):
        head = calibrator.build(parameters, trained).to(scores.device).eval()
        balanced = scores.balanced_accuracy(head)
        if best is None or round(balanced, _DIGITS) > round(best[0], _DIGITS):
            best = balanced, parameters
    if best is None:
        raise AssertionError(f"calibrator {calibrator.name} has no candidates")
    balanced, parameters = best
    fit = scores.fit_temperature(calibrator.build(parameters, trained).to(scores.device).eval())
    plain = {name: v for name, v in parameters.items() if not isinstance(v, Tensor)}
    return parameters, CalibratorScore(calibrator.name, plain, balanced, fit.nll, fit.temperature)


def _validation(run: TrainedRun, data: LongTailData, *, force: bool) -> Images:
    """Return the validation images.

    Raises:
        UsageError: if there are none, or too few of a class.
    """
    images = data.validation
    remedy = _more_images(run)
    if images is None or not len(images):
        raise UsageError(
            f"calibration requires validation images, but this run has none; {remedy} and train again"
        )
    counts = np.bincount(images.targets, minlength=data.num_classes)
    fewest = int(counts.argmin())
    if counts[fewest] < FEWEST and not force:
        few = int((counts < FEWEST).sum())
        raise UsageError(
            f"calibration requires at least {FEWEST} validation images per class, but {few} of "
            f"{data.num_classes} classes have fewer: class {data.class_names[fewest]!r} has "
            f"{counts[fewest]}; {remedy} and train again, or accept them (--force, force=True)"
        )
    return images


def _more_images(run: TrainedRun) -> str:
    """Describe how to get more validation images of a run's data set."""
    config = run.checkpoint.config
    if any(item.name == "validation_per_class" for item in settings_of(type(config.parts["data"]))):
        return f"hold out training images (--validation-per-class N, at least {FEWEST})"
    if is_own(config.data):
        return (
            "hold out enough images (--split-validation), or add validation images to your files "
            "(val.txt for list, val/CLASS for folder)"
        )
    return f"choose another data set, because {config.data} has no more,"
