"""When a run writes its checkpoints, and how the ranks take part."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from fastsam.distributed import World
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.results import Epoch
from fastsam.longtail.training.run_folder import RunFolder

CHECKPOINT_SECONDS = 10.0
"""Seconds between checkpoints, written after an epoch; the last epoch always has one."""


class Saver:
    """Writes the checkpoints of a run on rank 0.

    Args:
        folder: output folder; None to write nothing.
        world: the ranks of the run. All call :meth:`after_epoch`, because each may hold parts of the state.
        keep: epochs whose checkpoint is also kept as ``epoch-K.pt``.
        settings: text of the file of settings, which is written before the first checkpoint.
    """

    def __init__(
        self, folder: RunFolder | None, world: World, keep: Collection[int], settings: str
    ) -> None:
        self._folder = folder
        self._world = world
        self._keep = keep
        self._settings = settings
        self._saved = time.perf_counter()

    def after_epoch(
        self, history: Sequence[Epoch], checkpoint: Callable[[], Checkpoint], *, last: bool
    ) -> None:
        """Write what is due after an epoch.

        Args:
            history: the epochs so far.
            checkpoint: returns the state of the run; all ranks must call it together.
            last: whether it is the last epoch of the run.

        Raises:
            OSError: if a file cannot be written. The previous version of the file is kept.
        """
        if self._folder is None:
            return
        kept = history[-1].epoch in self._keep
        now = time.perf_counter()
        # The clocks of the ranks differ: rank 0 decides.
        due = last or self._world.all_gather(now - self._saved > CHECKPOINT_SECONDS)[0]
        if not (kept or due):
            return
        state = checkpoint()
        if self._world.rank == 0:
            self._folder.write_settings(self._settings)
            if kept:
                state.save(self._folder.kept(history[-1].epoch))
            if due:
                state.save(self._folder.checkpoint)
                self._folder.write_history(history)
        if due:
            self._saved = now
