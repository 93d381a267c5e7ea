"""When a run writes its checkpoints, and how the ranks take part."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastsam.distributed import World
from fastsam.files import duplicate
from fastsam.longtail.archive import write_archive
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.results import Epoch
from fastsam.longtail.sharded_archive import start_writing
from fastsam.longtail.sharding import gathered
from fastsam.longtail.training.background import BackgroundWrites
from fastsam.longtail.training.run_folder import RunFolder
from fastsam.text import notice

EPOCH_SECONDS = 10.0
"""Seconds between checkpoints that are written after an epoch; the last epoch always has one."""


class Saver:
    """Writes the checkpoints of a run in the background, from copies of its state.

    All ranks call each method together, because each may hold parts of the state. After an epoch rank 0
    writes whole tensors. Between two steps each rank of a sharded network writes its own parts.

    Args:
        folder: output folder; None to write nothing.
        world: the ranks of the run.
        config: settings of the run.
        keep: epochs whose checkpoint is also kept as ``epoch-K.pt``.
        settings: text of the file of settings, which is written before the first checkpoint.
        fresh: whether the run begins. It then replaces a file of settings in the folder.
        sharded: whether each rank holds only a part of each weight.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        world: World,
        config: TrainConfig,
        keep: Collection[int],
        *,
        settings: str,
        fresh: bool,
        sharded: bool,
    ) -> None:
        self._folder = folder
        self._world = world
        self._config = config
        self._keep = keep
        self._settings = settings
        self._fresh = fresh
        self._sharded = sharded
        # Its own, because collectives of the training run at the same time.
        writes_parts = sharded and folder is not None
        timeout = timedelta(seconds=config.rank_timeout)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if writes_parts else None
        self._writes = BackgroundWrites()
        self._saved = self._saved_epoch = time.perf_counter()
        self._asked = False
        self._batches = 0

    def begin_at(self, batches: int) -> None:
        """Set the number of batches before the first step of this process, over all epochs."""
        self._batches = batches

    def asks(self) -> bool:
        """Return whether this rank asks for a checkpoint within an epoch; it asks once for each.

        The clock of rank 0 decides.
        """
        minutes = self._config.checkpoint_minutes
        if self._asked or self._folder is None or self._world.rank != 0 or minutes == 0:
            return False
        self._asked = time.perf_counter() - self._saved > 60.0 * minutes
        return self._asked

    def after_step(self, batches: int, checkpoint: Callable[[], Checkpoint], *, now: bool) -> None:
        """Write a checkpoint between two steps if it is due.

        Args:
            batches: number of batches of the run so far, over all epochs.
            checkpoint: returns the state of the run.
            now: whether it is due in any case.

        Raises:
            OSError: if neither the checkpoint before nor this one can be written.
        """
        if self._folder is not None and (now or self._due_by_steps(batches)):
            self._save(self._folder, checkpoint(), batches)

    def after_epoch(
        self,
        history: Sequence[Epoch],
        batches: int,
        checkpoint: Callable[[], Checkpoint],
        *,
        last: bool,
    ) -> None:
        """Write what is due after an epoch.

        Args:
            history: the epochs so far.
            batches: number of batches of the run so far, over all epochs.
            checkpoint: returns the state of the run.
            last: whether it is the last epoch of the run; then wait until the files are written.

        Raises:
            OSError: if a file cannot be written. The previous version of the file is kept.
        """
        if self._folder is None:
            return
        epoch = history[-1].epoch
        late = time.perf_counter() - self._saved_epoch > EPOCH_SECONDS
        due = last or epoch in self._keep or self._due_by_steps(batches)
        # The clocks of the ranks differ: rank 0 decides.
        if due or self._world.all_gather(late)[0]:
            self._save(self._folder, checkpoint(), batches)
        if last:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            OSError: if it cannot be written.
        """
        self._writes.wait()

    def finish_stopped(self) -> None:
        """Wait until the checkpoint of a stopped run is written, on all ranks.

        Raises:
            OSError: if it cannot be written.
        """
        self.wait()
        if self._folder is not None and self._world.rank == 0:
            self._folder.stopped.touch()
        self._world.barrier()  # no rank ends, and says that all is saved, before rank 0 has written

    def close(self) -> None:
        """Wait until the last checkpoint is written, or its write has failed."""
        self._writes.close()

    def _due_by_steps(self, batches: int) -> bool:
        """Return whether a checkpoint is due because of ``checkpoint_steps``.

        A checkpoint is complete at the latest when the next one begins. A killed run may therefore repeat the
        steps of two intervals, so an interval is half of what it may repeat.
        """
        steps = self._config.checkpoint_steps
        return steps is not None and batches - self._batches >= max(1, steps // 2)

    def _save(self, folder: RunFolder, state: Checkpoint, batches: int) -> None:
        failed = False
        try:
            self._writes.wait()
        except OSError as error:
            notice(f"a checkpoint was not written: {error}. Trying again")
            failed = True
        self._saved, self._asked, self._batches = time.perf_counter(), False, batches
        writes = self._world.rank == 0
        if state.unfinished is None:
            self._saved_epoch = self._saved
        step = 0 if state.unfinished is None else state.unfinished["batches"]
        sharded = self._sharded and state.unfinished is not None
        path = folder.point(state.epoch, step, sharded=sharded)
        content = state.as_dict()
        if sharded:
            write = start_writing(path, content, self._world, self._group)
        else:
            copies = gathered(content, keep=writes)

            def write() -> None:
                write_archive(path, copies)

        def written() -> None:
            if writes:
                folder.write_settings(self._settings, replace=self._fresh)
                self._fresh = False
            if writes or sharded:
                write()
            if not writes:
                return
            if state.unfinished is None:
                duplicate(path, folder.checkpoint)
                if state.epoch in self._keep:
                    write_archive(folder.kept(state.epoch), copies)  # no link: damage stays apart
                folder.write_history(state.history)
            folder.prune(path, self._config.keep_last)

        self._writes.start(written)
        if failed or self._config.checkpoint_steps == 1:
            self._writes.wait()
