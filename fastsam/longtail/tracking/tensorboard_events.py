"""TensorBoard: event files in the folder of the run."""

from __future__ import annotations

from pathlib import Path
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


class TensorBoardEvents:
    """Write epochs as scalars, and settings with the figures of the result as hyperparameters.

    TensorBoard has no projects: project, name and tags are a text.

    Args:
        folder: where the event files are written.
        run: the run.
        config: its settings.
    """

    def __init__(self, folder: Path, run: Tracked, config: TrainConfig) -> None:
        self._config = config
        self._writer = _writer()(str(folder))
        text = f"{run.project} / {run.shown_name}, tags: {', '.join(run.tags) or 'none'}"
        self._writer.add_text("run", text)

    def epoch(self, record: Epoch) -> None:
        """Write the scalars of an epoch."""
        for name, value in epoch_figures(record).items():
            self._writer.add_scalar(name, value, record.epoch)

    def result(self, result: Result) -> None:
        """Write the figures, as scalars of the last epoch and beside the settings."""
        figures = result_figures(result)
        epoch = len(result.history)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.add_hparams(
            hyperparameters(self._config), figures, run_name=".", global_step=epoch
        )

    def close(self, *, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()


def _writer() -> Any:
    with requires_extra("tensorboard", "--track tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def _check(run: Tracked) -> None:
    _folder(run)
    _writer()


def _folder(run: Tracked) -> Path:
    if run.out is None:
        raise UsageError("--track tensorboard writes into the run's folder: give --out DIR")
    return Path(run.out) / "tensorboard"


def _begin(run: Tracked, config: TrainConfig) -> TensorBoardEvents:
    return TensorBoardEvents(_folder(run), run, config)


KIND = TrackerKind("tensorboard", _check, _begin)
