"""Weights & Biases tracker."""

from __future__ import annotations

from typing import Any

from fastsam.extras import requires_extra
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.results import Epoch, Result
from fastsam.longtail.tracking.base import (
    Tracked,
    TrackerKind,
    epoch_figures,
    hyperparameters,
    result_figures,
)


class WandbRun:
    """Log epochs to Weights & Biases, and the result to the summary of the run.

    Args:
        run: identity of the run.
        config: settings of the run.
    """

    def __init__(self, run: Tracked, config: TrainConfig) -> None:
        self._run = _wandb().init(
            project=run.project,
            name=run.shown_name,
            tags=list(run.tags) or None,
            config=hyperparameters(config),
        )

    def epoch(self, record: Epoch) -> None:
        """Log an epoch."""
        self._run.log(epoch_figures(record), step=record.epoch, commit=True)

    def result(self, result: Result) -> None:
        """Write the metrics of the result to the summary."""
        self._run.summary.update(result_figures(result))

    def close(self, *, failed: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


def _wandb() -> Any:
    with requires_extra("wandb", "--track wandb"):
        import wandb
    return wandb


def _check(run: Tracked) -> None:
    _wandb()


KIND = TrackerKind("wandb", _check, WandbRun)
