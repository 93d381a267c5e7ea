"""Experiment tracking with TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import unknown
from fastsam.longtail.tracking import mlflow_run, tensorboard_events, wandb_run
from fastsam.longtail.tracking.base import Silent, Tracked, Tracker, TrackerKind

_KINDS = {kind.name: kind for kind in (tensorboard_events.KIND, wandb_run.KIND, mlflow_run.KIND)}
TRACKERS = ("none", *_KINDS)

__all__ = ["TRACKERS", "Tracked", "Tracker", "TrackerKind", "check_tracker", "tracker"]


def check_tracker(run: Tracked) -> None:
    """Check that the tracker of a run can be used, before anything is written.

    Args:
        run: tracker and identity of the run.

    Raises:
        UsageError: if the tracker is unknown, or is TensorBoard and the run has no folder.
        ImportError: if the package is not installed; the message names the extra that installs it.
    """
    if run.track not in TRACKERS:
        raise unknown("tracker", run.track, TRACKERS)
    if run.track != "none":
        _KINDS[run.track].check(run)


@contextmanager
def tracker(run: Tracked, config: TrainConfig) -> Iterator[Tracker]:
    """Open a tracker for a run. Leaving the context closes it; an exception marks the run as failed.

    Args:
        run: tracker and identity of the run, checked by :func:`check_tracker`.
        config: settings of the run, which are logged once.
    """
    sink: Tracker = Silent() if run.track == "none" else _KINDS[run.track].begin(run, config)
    try:
        yield sink
    except BaseException:
        sink.close(failed=True)
        raise
    sink.close(failed=False)
