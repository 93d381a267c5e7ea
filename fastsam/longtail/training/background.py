"""Writes of checkpoints while the training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fastsam.text import notice


class BackgroundWrites:
    """Runs writes on a thread, one at a time and in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastsam-checkpoint")
        self._write: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Start ``write`` after the write before."""
        self._write = self._thread.submit(write)

    def wait(self) -> None:
        """Wait for the last write.

        Raises:
            OSError: if it failed.
        """
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def close(self) -> None:
        """Wait for the last write and end the thread. Print a notice if the write failed."""
        self._thread.shutdown()
        error = None if self._write is None else self._write.exception()
        if error is not None:
            notice(f"the last checkpoint was not written: {error}")
