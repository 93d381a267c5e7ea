"""MLflow tracker. It uses the tracking URI of the environment variable ``MLFLOW_TRACKING_URI``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fastsam.extras import requires_extra
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import UsageError
from fastsam.longtail.results import Epoch, Result
from fastsam.longtail.tracking.base import (
    Tracked,
    TrackerKind,
    epoch_figures,
    hyperparameters,
    result_figures,
)


class MlflowRun:
    """Log settings to MLflow as parameters, and epochs and the result as metrics.

    A separate client leaves MLflow's active run untouched.

    Args:
        run: identity of the run. A tag ``KEY=VALUE`` becomes an MLflow tag; any other tag gets the value
            "true".
        config: settings of the run.
    """

    def __init__(self, run: Tracked, config: TrainConfig) -> None:
        self._client, self._metric = _client()
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        tags = {
            key: value if equals else "true"
            for key, equals, value in (tag.partition("=") for tag in run.tags)
        }
        made = self._client.create_run(experiment, tags=tags, run_name=run.shown_name)
        self._id = made.info.run_id
        for name, value in hyperparameters(config).items():
            self._client.log_param(self._id, name, value)

    def epoch(self, record: Epoch) -> None:
        """Log an epoch."""
        self._log(epoch_figures(record), record.epoch)

    def result(self, result: Result) -> None:
        """Log the metrics of the result at the last epoch."""
        self._log(result_figures(result), len(result.history))

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)


def _client() -> tuple[Any, Any]:
    """Create an MLflow client, and return it with the class of MLflow's metrics.

    Raises:
        ImportError: if MLflow is not installed.
        UsageError: if MLflow cannot use its tracking URI.
    """
    with requires_extra("mlflow", "--track mlflow"):
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException
    try:
        return MlflowClient(), Metric
    except MlflowException as error:
        raise UsageError(
            f"--track mlflow cannot store runs: {str(error).partition('. ')[0]}. Set MLFLOW_TRACKING_URI to "
            "a server (http://HOST:PORT), or to a folder (file:///DIR) and MLFLOW_ALLOW_FILE_STORE=true"
        ) from error


def _check(run: Tracked) -> None:
    _client()


KIND = TrackerKind("mlflow", _check, MlflowRun)
