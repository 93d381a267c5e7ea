"""Progress on standard error: a bar on a terminal, one line per minute elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from fastsam.text import printable

LINE_SECONDS = 60.0
"""Seconds between two lines if standard error is not a terminal."""


class ProgressBar:
    """A tqdm bar on standard error, or one line per minute if that is not a terminal.

    Nothing is shown if ``enabled`` is False, if the work takes less than a second (a minute without a
    terminal), or on a terminal without tqdm.

    Args:
        total: number of units of work; None if unknown.
        description: label in front of the bar.
        unit: name of one unit of work. Default ``"step"``.
        enabled: set to False to show nothing (``--quiet``).

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
        self._name, self._unit, self._total = printable(description), unit, total
        self._done = 0
        self._lines = enabled and not sys.stderr.isatty()
        self._last_line = time.monotonic()
        if not enabled or self._lines:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(
            total=total, desc=self._name, unit=unit, delay=1.0, dynamic_ncols=True, leave=False
        )

    def update(self, count: int = 1, *, note: str | None = None) -> None:
        """Record ``count`` finished units; ``note`` is a short text after the bar."""
        self._done += count
        if self._lines and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line(note)
        if self._bar is None:
            return
        if note is not None:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def _print_line(self, note: str | None) -> None:
        of = "" if self._total is None else f" of {self._total}"
        text = f"{self._name}: {self._unit} {self._done}{of}"
        print(text if note is None else f"{text}, {note}", file=sys.stderr, flush=True)
        self._last_line = time.monotonic()

    def write(self, message: str) -> None:
        """Print one line above the bar; do nothing without a bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Remove the bar. May be called repeatedly."""
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
