"""Trained runs: the network that a run evaluated, and everything needed to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastsam.longtail.build import build_objective, load_configured
from fastsam.longtail.calibrators import TrainedHead
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.classes import adjust_logits
from fastsam.longtail.data import LongTailData, Preprocessing
from fastsam.longtail.data.catalog import is_given
from fastsam.longtail.errors import DataError
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.models.heads import AffineHead
from fastsam.longtail.runtime import chosen_device
from fastsam.longtail.trained.calibration import Calibration, calibration_path, modules_hash


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A finished or interrupted run, ready for inference.

    Attributes:
        path: folder of the run, or a checkpoint file in it.
        checkpoint: checkpoint of the run.
        network: the network in evaluation mode on ``device``, with :meth:`Checkpoint.judged_weights`. It maps
            normalized images ``[B, channels, H, W]`` to logits ``[B, C]``; their softmax gives class
            probabilities. Its head applies logit scale and post-hoc adjustment, or the calibration instead.
        trained_head: the head without logit scale, post-hoc adjustment and calibration.
        logit_scale: logit scale of the loss.
        class_names: one name per class.
        counts: training images of each class, int64 ``[C]``.
        groups: classes of head, mid and tail.
        device: device of the network.
        calibration: calibration that is applied, and replaces the post-hoc adjustment; None without one.

    Example:
        >>> import tempfile
        >>> from fastsam.longtail import Trainer, recipe
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = Trainer(recipe("digits-lt", "ce", "sgd", epochs=1).config(), out=folder).fit()
        >>> run = TrainedRun.load(folder)
        >>> run.network(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """

    path: Path
    checkpoint: Checkpoint
    network: Classifier
    trained_head: nn.Module
    logit_scale: float
    class_names: tuple[str, ...]
    counts: NDArray[np.int64]
    groups: Mapping[str, tuple[int, ...]]
    device: torch.device
    calibration: Calibration | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        data_root: str | None = None,
        calibrated: bool = True,
        module: nn.Module | None = None,
    ) -> TrainedRun:
        """Load a run.

        Args:
            path: folder of the run, or a checkpoint file in it.
            device: device of the network.
            data_root: folder with the data; None for the folder used in training.
            calibrated: apply the run's calibration, if there is one.
            module: your module, if it was passed to the trainer (network ``own:NAME``). It is copied.

        Raises:
            CheckpointError: if there is no checkpoint, it is damaged or within an epoch, or the calibration
                is damaged or belongs to other weights.
            UsageError: if the device does not exist.
        """
        path = Path(path)
        checkpoint = Checkpoint.load(path)
        checkpoint.check_whole(path)
        if data_root is not None:
            checkpoint.config = checkpoint.config.replace(data_root=data_root)
        if not checkpoint.counts:  # an older version wrote it
            data = load_configured(checkpoint.config, progress=False)
            checkpoint.check_data(data)
            checkpoint.describe_classes(data)
        config, where = checkpoint.config, chosen_device(device)
        counts = np.array(checkpoint.counts, dtype=np.int64)
        scale = build_objective(config, counts).logit_scale
        network = checkpoint.build_model(judged=True, module=module).to(where).eval()
        head = network.head
        offset = adjust_logits(torch.zeros(len(counts)), counts, config.posthoc_tau)
        network.head = AffineHead(head, scale, offset.to(where))
        calibration, file = None, calibration_path(path)
        if calibrated and file.is_file():
            calibration = Calibration.load(file)
            calibration.check_weights(modules_hash(network.features, head), file)
            network.head = calibration.head(TrainedHead(head, scale, counts)).to(where)
        groups = {name: tuple(members) for name, members in checkpoint.groups.items()}
        names = tuple(checkpoint.class_names)
        return cls(
            path, checkpoint, network, head, scale, names, counts, groups, where, calibration
        )

    @property
    def weights(self) -> str:
        """Which weights the network has. Of a run that is not finished, also how to continue it."""
        if self.finished:
            return self.checkpoint.rule
        done = f"epoch {self.checkpoint.epoch} of {self.checkpoint.config.epochs}"
        rule = self.checkpoint.rule.replace("last epoch", done)
        folder = self.path if self.path.is_dir() else self.path.parent
        if self.path not in (folder, folder / "checkpoint.pt"):
            return rule  # a kept checkpoint: the run may have trained for more epochs
        return f"{rule} (the run is not finished; `fastsam train --resume --out {folder}` continues it)"

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is that of the last epoch."""
        return self.checkpoint.epoch == self.checkpoint.config.epochs

    @cached_property
    def preprocessing(self) -> Preprocessing | None:
        """How an image file becomes the input of the network; None if that is unknown.

        It is unknown for data created in Python, because the user's code transforms them. Checkpoints of
        older versions do not store it; it is then taken from the data set.

        Raises:
            DataError: if the data set is required, but is missing or damaged.
        """
        stored = self.checkpoint.preprocessing
        if stored is not None or is_given(self.checkpoint.config.data):
            return stored
        return self.data().test.preprocessing

    def known_preprocessing(self) -> Preprocessing:
        """Return :attr:`preprocessing`, which must be known.

        Raises:
            DataError: if it is unknown, or the data set is required but is missing or damaged.
        """
        if self.preprocessing is None:
            raise DataError(
                f"the preprocessing of image files for {self.path} is unknown, because its data set "
                f"{self.checkpoint.config.data} was created in Python; prepare tensors as in training and "
                "pass them to TrainedRun.load(RUN).network"
            )
        return self.preprocessing

    def data(self, *, progress: bool = False) -> LongTailData:
        """Load the data set of the run.

        Args:
            progress: show progress: a bar on a terminal, one line per minute elsewhere.

        Raises:
            DataError: if it is missing or damaged.
        """
        return load_configured(self.checkpoint.config, progress=progress)
