"""What every tracker receives: settings, epochs, and the figures of the result."""

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
    """A run that is tracked.

    Attributes:
        track: name of the tracker.
        project: project or experiment that the run belongs to.
        name: name of the run; by default that of its folder.
        tags: words, or ``KEY=VALUE``.
        out: folder of the run.
    """

    track: str = "none"
    project: str = "fastsam"
    name: str | None = None
    tags: tuple[str, ...] = ()
    out: str | Path | None = None

    @property
    def shown_name(self) -> str | None:
        """The name, or that of the folder; None without both, where the tracker chooses one."""
        return self.name or (None if self.out is None else Path(self.out).resolve().name)


class Tracker(Protocol):
    """What receives a run."""

    def epoch(self, record: Epoch) -> None:
        """Send a finished epoch."""

    def result(self, result: Result) -> None:
        """Send the figures of the result."""

    def close(self, *, failed: bool) -> None:
        """End the run."""


@dataclass(frozen=True)
class TrackerKind:
    """A kind of tracker.

    Attributes:
        name: its name on the command line.
        check: raises what would keep it from working.
        begin: begins a run.
    """

    name: str
    check: Callable[[Tracked], None]
    begin: Callable[[Tracked, TrainConfig], Tracker]


class Silent:
    """A tracker that sends nothing."""

    def epoch(self, record: Epoch) -> None:
        """Do nothing."""

    def result(self, result: Result) -> None:
        """Do nothing."""

    def close(self, *, failed: bool) -> None:
        """Do nothing."""


def hyperparameters(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Settings by name; those with several values as text, separated by spaces."""
    return {
        name: value if isinstance(value, bool | int | float | str) else " ".join(map(str, value))
        for name, value in settings_in(config.as_dict()).items()
    }


def epoch_figures(record: Epoch) -> dict[str, float]:
    """The measurements of an epoch that exist, by name."""
    values: dict[str, Any] = asdict(record)
    return {key: value for key, value in values.items() if key != "epoch" and value is not None}


def result_figures(result: Result) -> dict[str, float]:
    """Figures of the test and validation sets, by names such as ``test/tail`` and ``test/ece``.

    Accuracies are in percent: overall, balanced, of head, mid and tail, the harmonic mean of classes and the
    worst class. Calibration is the expected calibration error ``ece``, in percent, and the negative log
    likelihood ``nll``, in nats. Figures that are not known are left out.
    """
    sets = {"test": result.test, "validation": result.validation}
    figures = {
        f"{split}/{name}": value
        for split, metrics in sets.items()
        if metrics is not None
        for name, value in _figures(metrics).items()
        if value is not None and math.isfinite(value)
    }
    return figures if result.gradients is None else {**figures, "gradients_total": result.gradients}


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
