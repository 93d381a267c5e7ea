"""Runs as they go, sent to TensorBoard, Weights & Biases or MLflow."""

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
    """Refuse a tracker that could not be used, before anything is written.

    Args:
        run: what will be tracked, and where.

    Raises:
        UsageError: for an unknown name, or TensorBoard without a folder.
        ImportError: if the package is not installed; the message names the extra that installs it.
    """
    if run.track not in TRACKERS:
        raise unknown("tracker", run.track, TRACKERS)
    if run.track != "none":
        _KINDS[run.track].check(run)


@contextmanager
def tracker(run: Tracked, config: TrainConfig) -> Iterator[Tracker]:
    """What receives epochs and result of a run; closed when the context ends, as failed by an error.

    Args:
        run: what is tracked, and where; checked by :func:`check_tracker`.
        config: settings of the run, recorded once.
    """
    sink: Tracker = Silent() if run.track == "none" else _KINDS[run.track].begin(run, config)
    try:
        yield sink
    except BaseException:
        sink.close(failed=True)
        raise
    sink.close(failed=False)
