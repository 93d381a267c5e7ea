"""TensorBoard tracker. It writes event files into the folder of the run."""

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
    """Log epochs to TensorBoard as scalars, and settings and result as hyperparameters.

    TensorBoard has no projects, so project, name and tags are logged as a text.

    Args:
        folder: folder of the event files.
        run: identity of the run.
        config: settings of the run.
    """

    def __init__(self, folder: Path, run: Tracked, config: TrainConfig) -> None:
        self._config = config
        self._writer = _writer()(str(folder))
        text = f"{run.project} / {run.shown_name}, tags: {', '.join(run.tags) or 'none'}"
        self._writer.add_text("run", text)

    def epoch(self, record: Epoch) -> None:
        """Log the metrics of an epoch as scalars."""
        for name, value in epoch_figures(record).items():
            self._writer.add_scalar(name, value, record.epoch)

    def result(self, result: Result) -> None:
        """Log the metrics of the result, as scalars of the last epoch and with the hyperparameters."""
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
        raise UsageError(
            "--track tensorboard requires an output folder for its event files; pass --out DIR"
        )
    return Path(run.out) / "tensorboard"


def _begin(run: Tracked, config: TrainConfig) -> TensorBoardEvents:
    return TensorBoardEvents(_folder(run), run, config)


KIND = TrackerKind("tensorboard", _check, _begin)
