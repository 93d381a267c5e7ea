"""Calibrate a trained classifier on the validation images of its run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import cache

import numpy as np
from torch import Tensor

from fastsam.longtail.calibrators import CALIBRATORS, Calibrator, Parameters, TrainedHead
from fastsam.longtail.config import is_own
from fastsam.longtail.data import Images, LongTailData
from fastsam.longtail.data.long_tailed import FEWEST
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.features import Features, collect_features
from fastsam.longtail.settings import settings_of
from fastsam.longtail.trained.calibration import Calibration, CalibratorScore, weights_hash
from fastsam.longtail.trained.head_scores import HeadScores
from fastsam.longtail.trained.run import TrainedRun
from fastsam.threads import cpu_threads

BEST = "best"
"""Name of the choice among all calibrators."""
NONE = "none"
"""Name of the calibrator that changes nothing; it is always in the table."""
_DIGITS = 9
"""Percentages that agree to so many decimals are ties: sums round."""


def calibrate_run(
    run: TrainedRun,
    *,
    method: str = BEST,
    force: bool = False,
    data: LongTailData | None = None,
    progress: bool = False,
) -> Calibration:
    """Choose a change of the classifier, and fit a temperature, on the run's validation images.

    Each calibrator has candidates, such as values of tau. The candidate with the highest balanced
    validation accuracy (mean over classes) is chosen; ties go to the one nearest to no change. Then the
    temperature T of ``softmax(logits / T)`` is fitted, which minimizes the negative log-likelihood of the
    validation images and changes no answer. Test images are neither read nor compared with those of the
    training.

    Calibration starts from the trained head and the logit scale of its loss. It takes the place of the
    run's post-hoc adjustment (``posthoc_tau``).

    Args:
        run: the run; it is left unchanged. Write the result with :meth:`Calibration.save`, to
            :func:`~fastsam.longtail.trained.calibration.calibration_path`, and
            :meth:`TrainedRun.load` applies it.
        method: a calibrator, or ``best`` for the best of all that fit the head.
        force: accept classes with fewer than 5 validation images.
        data: the data set that the run was trained on; by default it is loaded.
        progress: show progress: a bar on a terminal, a line a minute elsewhere.

    Raises:
        UsageError: an unknown calibrator, or one that has no meaning for the head; no validation images, or
            too few of a class.
        DataError: the data are missing or damaged.
        CheckpointError: the training or validation images are not those of the run.
        TrainingError: a feature or logit is infinite or NaN.

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
    with cpu_threads(run.checkpoint.config.threads), closing(data):
        validation = _validation(run, data, force=force)
        run.checkpoint.check_data(data, splits=("train", "validation"))

        def features(images: Images, name: str) -> Features:
            return collect_features(
                run.network,
                images,
                run.device,
                batch_size=run.checkpoint.config.batch_size,
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
    # The first of the best: ties go to the smaller change.
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
        weights=weights_hash(run.network.features, run.trained_head),
        refused=refused,
    )


def _calibrators(method: str, trained: TrainedHead) -> tuple[list[str], dict[str, str]]:
    """Names of the calibrators among which validation chooses, and why others are left out.

    Raises:
        UsageError: there is no such calibrator, or it has no meaning for the head.
    """
    if method != BEST:
        calibrator = CALIBRATORS.get(method)
        if calibrator is None:
            raise unknown("calibrator", method, (BEST, *CALIBRATORS.names()))
        reason = calibrator.refuses(trained)
        if reason is not None:
            raise UsageError(
                f"calibrator {method} has no meaning for this run: {reason}; choose another, or {BEST}"
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
    """The first of the candidates with the highest balanced accuracy, and its score."""
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
    """The validation images.

    Raises:
        UsageError: there are none, or too few of a class.
    """
    images = data.validation
    remedy = _more_images(run)
    if images is None or not len(images):
        raise UsageError(
            f"this run has no validation images to choose a calibration on; {remedy} and train again"
        )
    counts = np.bincount(images.targets, minlength=data.num_classes)
    fewest = int(counts.argmin())
    if counts[fewest] < FEWEST and not force:
        few = int((counts < FEWEST).sum())
        raise UsageError(
            f"{few} of {data.num_classes} classes have fewer than {FEWEST} validation images, class "
            f"{data.class_names[fewest]!r} has {counts[fewest]}: too few to choose a calibration on; "
            f"{remedy} and train again, or accept them (--force, force=True)"
        )
    return images


def _more_images(run: TrainedRun) -> str:
    """How the data set of a run gets more validation images."""
    config = run.checkpoint.config
    if any(item.name == "validation_per_class" for item in settings_of(type(config.parts["data"]))):
        return f"hold some out of the training set (--validation-per-class N, at least {FEWEST})"
    if is_own(config.data):
        return "add some to your files (val.txt for list, val/CLASS for folder)"
    return f"{config.data} has no more: choose a data set with more of them"
