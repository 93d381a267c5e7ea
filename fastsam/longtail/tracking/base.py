"""Interface of trackers, and the settings and metrics that they receive."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fastsam.longtail.config import TrainConfig, settings_in
from fastsam.longtail.metrics import Metrics
from fastsam.longtail.results import Epoch, Result


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """Tracker and identity of a run.

    Attributes:
        track: name of the tracker, or ``none``.
        project: project or experiment that the run belongs to.
        name: name of the run; by default the name of its folder.
        tags: tags, ``TEXT`` or ``KEY=VALUE``.
        out: folder of the run.
    """

    track: str = "none"
    project: str = "fastsam"
    name: str | None = None
    tags: tuple[str, ...] = ()
    out: str | Path | None = None

    @property
    def shown_name(self) -> str | None:
        """Name of the run, else of its folder; None if it has neither, and the tracker chooses a name."""
        return self.name or (None if self.out is None else Path(self.out).resolve().name)


class Tracker(Protocol):
    """Receiver of the metrics of a run."""

    def epoch(self, record: Epoch) -> None:
        """Log the metrics of a finished epoch."""

    def result(self, result: Result) -> None:
        """Log the metrics of the result."""

    def close(self, *, failed: bool) -> None:
        """End the run."""


@dataclass(frozen=True)
class TrackerKind:
    """A kind of tracker.

    Attributes:
        name: name on the command line.
        check: raises an error if the tracker cannot be used.
        begin: starts a run.
    """

    name: str
    check: Callable[[Tracked], None]
    begin: Callable[[Tracked, TrainConfig], Tracker]


class Silent:
    """A tracker that discards everything."""

    def epoch(self, record: Epoch) -> None:
        """Do nothing."""

    def result(self, result: Result) -> None:
        """Do nothing."""

    def close(self, *, failed: bool) -> None:
        """Do nothing."""


def hyperparameters(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return the settings by name. Tuples become text, with values separated by spaces."""
    return {
        name: value if isinstance(value, bool | int | float | str) else " ".join(map(str, value))
        for name, value in settings_in(config.as_dict()).items()
    }


def epoch_figures(record: Epoch) -> dict[str, float]:
    """Return the metrics of an epoch by name, without those that are None."""
    values: dict[str, Any] = asdict(record)
    return {key: value for key, value in values.items() if key != "epoch" and value is not None}


def result_figures(result: Result) -> dict[str, float]:
    """Return the metrics of the test and validation sets, by names such as ``test/tail`` and ``test/ece``.

    Accuracies are in percent: overall, balanced, of head, mid and tail classes, the harmonic mean over
    classes and the worst class. The expected calibration error ``ece`` is in percent, the negative
    log-likelihood ``nll`` in nats. Metrics that are None or not finite are omitted.
    """
    sets = {"test": result.test, "validation": result.validation}
    figures = {
        f"{split}/{name}": value
        for split, metrics in sets.items()
        if metrics is not None
        for name, value in _figures(metrics).items()
        if value is not None and math.isfinite(value)
    }
    return (
        figures
        if result.total_gradients is None
        else {**figures, "gradients_total": result.total_gradients}
    )


def _figures(metrics: Metrics) -> dict[str, float | None]:
    return {
        "accuracy": metrics.accuracy,
        "balanced": metrics.balanced,
        **metrics.groups,
        "harmonic_mean": metrics.harmonic_mean,
        "worst_class": metrics.worst_class,
        "top5": metrics.top5,
        "macro_f1": metrics.macro_f1,
        "ece": metrics.ece,
        "nll": metrics.nll,
    }
