"""Checks whether a run can be resumed from its folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig, differences
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import CheckpointError
from fastsam.longtail.training.run_folder import RunFolder


@dataclass(frozen=True)
class Resume:
    """A run that may be resumed.

    Attributes:
        config: settings of the run.
        data: data set of the run.
        steps_per_epoch: batches per epoch.
        lone_last_image: whether batches of equal size would leave a last batch of one image.
        keep: epochs whose checkpoint is kept.
    """

    config: TrainConfig
    data: LongTailData
    steps_per_epoch: int
    lone_last_image: bool
    keep: Collection[int]

    def find(self, folder: RunFolder, resume: bool | Literal["auto"]) -> Checkpoint | None:
        """Find and load the newest checkpoint of the run in ``folder``.

        Args:
            folder: folder of the run.
            resume: True to require a checkpoint, ``"auto"`` to return None if there is none, False to return
                None.

        Raises:
            CheckpointError: if there is no checkpoint; if settings, data or number of batches differ; or if a
                checkpoint in ``keep`` is missing.
        """
        if not resume:
            return None
        for path in folder.checkpoints() or ([] if resume == "auto" else [folder.checkpoint]):
            checkpoint = Checkpoint.load(path)
            self._check(path, checkpoint)
            past = [epoch for epoch in sorted(self.keep) if epoch <= checkpoint.epoch]
            missing = [epoch for epoch in past if not folder.kept(epoch).is_file()]
            if not missing:
                return checkpoint
            if resume != "auto":
                raise CheckpointError(
                    f"{folder.path} is past epoch {missing[0]} but has no checkpoint of it, which --keep "
                    "requires; choose another --out to train again"
                )
        return None

    def _check(self, path: Path, checkpoint: Checkpoint) -> None:
        stored, wanted = checkpoint.config, self.config
        for name in differences(
            stored.as_dict(), wanted.as_dict(), same_content=bool(checkpoint.contents)
        ):
            raise CheckpointError(
                f"cannot resume from {path}: {name} was {getattr(stored, name)}, is now "
                f"{getattr(wanted, name)}; use the same settings or choose another --out"
            )
        checkpoint.check_data(self.data)
        if checkpoint.steps_per_epoch not in (None, self.steps_per_epoch):
            raise CheckpointError(
                f"cannot resume from {path}: it has {checkpoint.steps_per_epoch} steps per epoch, now there "
                f"are {self.steps_per_epoch}; the number of processes or of readable images has changed: "
                "restore it, or train again"
            )
        if checkpoint.steps_per_epoch is None:
            self._check_older(checkpoint)
        checkpoint.build_model()
        checkpoint.check_judged()

    def _check_older(self, checkpoint: Checkpoint) -> None:
        """Raise :class:`CheckpointError` for runs of older versions whose batches or counts would change."""
        if self.lone_last_image:
            raise CheckpointError(
                "cannot resume this run of an older version: the last batch of each epoch had one image, "
                "which is now merged into the previous batch; train again (--overwrite)"
            )
        if checkpoint.unreadable and any(i.left_out for i in self.data.splits.values()):
            raise CheckpointError(
                "cannot resume this run of an older version: its class counts include unreadable images, "
                "which are now removed before training; train again (--overwrite)"
            )
