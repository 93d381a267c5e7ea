"""Checks whether a run can be resumed from its folder."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from fastsam.distributed import World
from fastsam.longtail.archive import read_archive, read_outline
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.differences import changes
from fastsam.longtail.errors import CheckpointError, DamagedError
from fastsam.longtail.sharded_archive import read_sharded_archive, read_sharded_outline
from fastsam.longtail.training.run_folder import RunFolder
from fastsam.text import notice


def readable(
    folder: RunFolder, *, report: bool = False, outline: bool = False
) -> Iterator[tuple[Path, Checkpoint]]:
    """Load the checkpoints of a run, newest first. Skip damaged ones if an older one is sound.

    Args:
        folder: folder of the run.
        report: print a notice for each damaged one.
        outline: load everything but the values of tensors, in little time; see
            :func:`fastsam.longtail.archive.read_outline`. Damaged tensors are not noticed.

    Yields:
        Path and content of each.

    Raises:
        DamagedError: if there are checkpoints but all are damaged.
    """
    damaged: list[DamagedError] = []
    sound = False
    for path in folder.checkpoints():
        try:
            checkpoint = _load(path, outline=outline)
        except DamagedError as error:
            if (
                path.exists()
            ):  # else another process has just removed it, because it wrote a newer one
                damaged.append(error)
            continue
        if report:
            for reason in damaged:
                notice(f"{reason}; continuing from {path.name}")
        damaged, sound = [], True
        yield path, checkpoint
    if damaged and not sound:
        raise damaged[0]


def newest_outline(folder: RunFolder) -> Checkpoint | None:
    """Load the newest checkpoint of a run without the values of its tensors; None if there is none.

    Raises:
        DamagedError: if there are checkpoints but all are damaged.
    """
    return next((checkpoint for _, checkpoint in readable(folder, outline=True)), None)


def _load(path: Path, *, outline: bool = False) -> Checkpoint:
    """Load a checkpoint, also that of a sharded network."""
    if path.is_dir():
        content = read_sharded_outline(path) if outline else read_sharded_archive(path)
    else:
        content = read_outline(path) if outline else read_archive(path)
    return Checkpoint.from_dict(content, path)


def check_same_checkpoint(
    checkpoint: Checkpoint | None, folder: RunFolder | None, world: World
) -> None:
    """Check that all ranks continue from the same checkpoint. They must call this together.

    Args:
        checkpoint: what this rank found; None to begin.
        folder: folder of the run; None if nothing is written.
        world: the ranks of the run.

    Raises:
        CheckpointError: if the ranks found different ones.
    """
    place = None
    if checkpoint is not None:
        batches = 0 if checkpoint.unfinished is None else checkpoint.unfinished["batches"]
        place = checkpoint.epoch, batches
    if not world.agree((folder is None, place)):
        raise CheckpointError(
            "the processes find different checkpoints in --out; choose a folder on a file system that all "
            "machines share"
        )


@dataclass(frozen=True)
class Resume:
    """A run that may be resumed.

    Attributes:
        config: settings of the run.
        data: data set of the run.
        steps_per_epoch: batches per epoch.
        keep: epochs whose checkpoint is kept.
        world: the ranks of the run.
        module: module of a network ``own:NAME``; None for other networks.
    """

    config: TrainConfig
    data: LongTailData
    steps_per_epoch: int
    keep: Collection[int]
    world: World = World()  # noqa: RUF009 (frozen)
    module: nn.Module | None = None

    def find(self, folder: RunFolder, resume: bool | Literal["auto"]) -> Checkpoint | None:
        """Find and load the newest checkpoint of the run in ``folder``.

        Args:
            folder: folder of the run.
            resume: True to require a checkpoint, ``"auto"`` to return None if there is none, False to return
                None.

        Raises:
            CheckpointError: if there is no checkpoint; if it has an older version; if settings, data or
                number of batches differ; or if a checkpoint in ``keep`` is missing.
        """
        if not resume:
            return None
        if not folder.checkpoints() and resume != "auto":
            Checkpoint.load(folder.checkpoint)  # raises: there is none
        reached = 0
        for path, checkpoint in readable(folder, report=self.world.rank == 0):
            self._check(path, checkpoint)
            past = [epoch for epoch in sorted(self.keep) if epoch <= checkpoint.epoch]
            missing = [epoch for epoch in past if not folder.kept(epoch).is_file()]
            if not missing:
                self._report_missing(reached, checkpoint.epoch)
                return checkpoint
            reached = max(reached, checkpoint.epoch)
            if resume != "auto":
                raise CheckpointError(
                    f"{folder.path} is past epoch {missing[0]} but has no checkpoint of it, which --keep "
                    "requires; choose another --out to train again"
                )
        self._report_missing(reached, 0)
        return None

    def _report_missing(self, reached: int, begun: int) -> None:
        if begun < reached and self.world.rank == 0:
            notice(
                f"the run has reached epoch {reached}, but the checkpoint of an epoch in --keep is "
                f"missing; continuing after epoch {begun}"
            )

    def _check(self, path: Path, checkpoint: Checkpoint) -> None:
        try:
            checkpoint.check_continues()
        except CheckpointError as error:
            raise CheckpointError(f"cannot resume from {path}: {error}") from None
        changed = changes(
            checkpoint.config.as_dict(),
            self.config.as_dict(),
            same_content=bool(checkpoint.contents),
        )
        if changed:
            raise CheckpointError(
                f"cannot resume from {path}: {changed}. Use the same settings or choose another --out"
            )
        checkpoint.check_data(self.data)
        if checkpoint.steps_per_epoch != self.steps_per_epoch:
            raise CheckpointError(
                f"cannot resume from {path}: it has {checkpoint.steps_per_epoch} steps per epoch, now there "
                f"are {self.steps_per_epoch}; the number of processes or of readable images has changed: "
                "restore it, or train again"
            )
        checkpoint.build_model(module=self.module)
        checkpoint.check_judged(module=self.module)
        if checkpoint.world_size != self.world.world_size and self.world.rank == 0:
            warnings.warn(
                f"the run was trained by {checkpoint.world_size} process(es) and continues with "
                f"{self.world.world_size}. The batches stay the same, but the result differs from an "
                "uninterrupted run: each process normalizes and samples its own part of a batch, and sums "
                "are rounded differently. For the same result, use the same number of processes",
                stacklevel=4,
            )
