"""Writes of checkpoints while the training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWrites:
    """Runs writes on a thread, one at a time and in order.

    The error of a write is raised by the next call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastsam-checkpoint")
        self._write: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Wait for the write before, and start ``write``.

        Raises:
            OSError: if the write before failed.
        """
        self.wait()
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
        """Wait for the last write and end the thread, whether it succeeded or not."""
        self._thread.shutdown()
