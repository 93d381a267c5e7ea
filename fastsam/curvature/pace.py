"""Spacing of measurements during training, by steps and by a share of the training time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastsam.curvature.checks import check_count, check_number


class Pace:
    """Decides which steps of a training run are measured.

    A measurement is due at the first step, and at every step that reaches or passes another multiple
    of ``every``. With a budget it then waits until the time of all measurements, with that of the
    last one as the forecast of the next, is at most the budget times the training time. Nothing
    forecasts the first measurement, so it does not wait, and the share exceeds the budget until
    training has made up for it.

    Args:
        every: number of steps from one measurement to the next.
        budget: largest share of the training time; None for no limit.
        clock: returns the time in seconds.

    Attributes:
        training_seconds: time between measurements, with everything that the training loop does.
        measuring_seconds: time of the measurements.

    Raises:
        TypeError, ValueError: an argument is invalid.

    Example:
        >>> pace, found = Pace(every=2, budget=None, clock=lambda: 0.0), []
        >>> for step in range(6):
        ...     if pace.is_due(step):
        ...         with pace.measurement(step):
        ...             found.append(step)
        >>> found
        [0, 2, 4]
    """

    def __init__(self, *, every: int, budget: float | None, clock: Callable[[], float]) -> None:
        check_count("every", every, unit="steps")
        if budget is not None:
            check_number("budget", budget, below=float("inf"), unit="share of the training time")
            if budget == 0:
                raise ValueError(
                    "budget must be above 0, got 0; pass a share of the training time such as 0.05, or "
                    "None for no limit"
                )
        self._every = every
        self._budget = budget
        self._clock = clock
        self.training_seconds = 0.0
        self.measuring_seconds = 0.0
        self._forecast = 0.0
        self._latest: int | None = None
        self._since: float | None = None

    @property
    def overhead(self) -> float:
        """Time of the measurements divided by the training time; 0 before the first measurement."""
        if self.measuring_seconds == 0:
            return 0.0
        return (
            self.measuring_seconds / self.training_seconds
            if self.training_seconds
            else float("inf")
        )

    def train(self) -> None:
        """Count the time since the last call or measurement as training time."""
        now = self._clock()
        if self._since is not None:
            self.training_seconds += now - self._since
        self._since = now

    def is_due(self, step: int) -> bool:
        """Return whether to measure at ``step``."""
        if self._latest is None:
            return True
        if step // self._every <= self._latest // self._every:
            return False
        if self._budget is None:
            return True
        expected = self.measuring_seconds + self._forecast
        return expected <= self._budget * self.training_seconds

    @contextmanager
    def measurement(self, step: int) -> Iterator[None]:
        """Count the time inside the context as that of a measurement."""
        began = self._clock()
        yield
        self._since = self._clock()
        self._forecast = self._since - began
        self.measuring_seconds += self._forecast
        self._latest = step

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs. The time until it resumes does not count."""
        return {
            "training_seconds": self.training_seconds,
            "measuring_seconds": self.measuring_seconds,
            "forecast": self._forecast,
            "latest": self._latest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state_dict`."""
        self.training_seconds = state["training_seconds"]
        self.measuring_seconds = state["measuring_seconds"]
        self._forecast = state["forecast"]
        self._latest = state["latest"]
        self._since = None
