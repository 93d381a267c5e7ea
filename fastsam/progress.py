"""A progress bar for anything longer than a second or two; never in the way, never required."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class ProgressBar:
    """A tqdm bar on standard error, or nothing at all.

    Nothing is shown when ``enabled`` is False, when standard error is not a terminal, when tqdm is
    not installed, or when the work is over within a second.

    Args:
        total: how many :meth:`update` calls complete the work; None where that is not known.
        description: what is being done, in front of the bar.
        unit: name of one unit of work.
        enabled: False keeps silent (``--quiet``).

    Example:
        >>> with ProgressBar(total=3, description="Lanczos", unit="step") as bar:
        ...     for _ in range(3):
        ...         bar.update()
    """

    def __init__(
        self,
        *,
        total: int | None,
        description: str,
        unit: str = "step",
        enabled: bool = True,
    ) -> None:
        self._bar: Any = None
        if not enabled or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(
            total=total, desc=description, unit=unit, delay=1.0, dynamic_ncols=True, leave=False
        )

    def update(self, count: int = 1, *, note: str | None = None) -> None:
        """Record ``count`` finished units; ``note`` is a short text behind the bar."""
        if self._bar is None:
            return
        if note is not None:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def write(self, message: str) -> None:
        """Print one line above the bar; silent whenever the bar is."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Remove the bar; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
