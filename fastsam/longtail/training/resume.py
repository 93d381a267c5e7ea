"""Whether a run can resume from what its folder holds."""

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
    """A run that may resume.

    Attributes:
        config: its settings.
        data: its data set.
        steps_per_epoch: batches of an epoch.
        lone_last_image: whether batches of equal size would leave one image for the last.
        keep: epochs whose checkpoint is kept.
    """

    config: TrainConfig
    data: LongTailData
    steps_per_epoch: int
    lone_last_image: bool
    keep: Collection[int]

    def find(self, folder: RunFolder, resume: bool | Literal["auto"]) -> Checkpoint | None:
        """The newest checkpoint of the run in ``folder``.

        Args:
            folder: where to look.
            resume: ``"auto"`` finds none where there is none; True raises.

        Raises:
            CheckpointError: there is no checkpoint, or it is of another run, other data or other
                batches, or one that should have been kept is missing.
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
                    f"{folder.path} is past epoch {missing[0]} and kept no checkpoint of it; "
                    "choose another --out to train again"
                )
        return None

    def _check(self, path: Path, checkpoint: Checkpoint) -> None:
        stored, wanted = checkpoint.config, self.config
        for name in differences(
            stored.as_dict(), wanted.as_dict(), same_content=bool(checkpoint.contents)
        ):
            raise CheckpointError(
                f"{path} is of another run: {name} is {getattr(stored, name)} there and "
                f"{getattr(wanted, name)} here; resume with the same settings or choose another --out"
            )
        checkpoint.check_data(self.data)
        if checkpoint.steps_per_epoch not in (None, self.steps_per_epoch):
            raise CheckpointError(
                f"{path} is of a run with {checkpoint.steps_per_epoch} steps in an epoch, here there are "
                f"{self.steps_per_epoch}; other images can be read now, or the number of processes is "
                "another one: restore them, or train again"
            )
        if checkpoint.steps_per_epoch is None:
            self._check_older(checkpoint)
        checkpoint.build_model()
        checkpoint.check_judged()

    def _check_older(self, checkpoint: Checkpoint) -> None:
        """Refuse runs of older versions that would not continue as they began."""
        if self.lone_last_image:
            raise CheckpointError(
                "an older version began this run, with a last batch of one image in every epoch; this "
                "image now joins the batch before, so train again (--overwrite)"
            )
        if checkpoint.unreadable and any(i.left_out for i in self.data.splits.values()):
            raise CheckpointError(
                "an older version began this run and kept images that cannot be read in its class "
                "counts; they are now left out before training, so train again (--overwrite)"
            )
