"""A trained run: the network that its result judges, and what is needed to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

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
from fastsam.longtail.trained.calibration import Calibration, calibration_path, weights_hash


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """The network of a finished or interrupted run, ready to be used.

    Attributes:
        path: the run's folder, or the file of a kept checkpoint.
        checkpoint: what was read.
        network: maps normalized images ``[B, channels, H, W]`` to logits ``[B, C]`` whose softmax is the
            probability that the run gives each class: logit scale and post-hoc adjustment, or the
            calibration in their place, are in its head.
            In evaluation mode, on ``device``, with the weights that the result judges.
        trained_head: the head as it was trained; its logits have neither.
        logit_scale: factor of the loss on logits.
        class_names: one per class.
        counts: training images of each class, int64 ``[C]``.
        groups: classes of head, mid and tail.
        device: where the network is.
        calibration: what `fastsam calibrate` chose, if it is applied; it replaces the post-hoc adjustment.

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
    trained_head: torch.nn.Module
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
    ) -> TrainedRun:
        """Read a run.

        Args:
            path: the run's folder, or the file of a kept checkpoint.
            device: where the network is wanted.
            data_root: folder with the data, if it is not where it was at the training.
            calibrated: apply the calibration beside the checkpoint, if there is one.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged; the calibration is damaged, or belongs
                to other weights.
            UsageError: the device does not exist.
        """
        path = Path(path)
        checkpoint = Checkpoint.load(path)
        if data_root is not None:
            checkpoint.config = checkpoint.config.replace(data_root=data_root)
        if not checkpoint.counts:  # an older version wrote it
            data = load_configured(checkpoint.config, progress=False)
            checkpoint.check_data(data)
            checkpoint.describe_classes(data)
        config, where = checkpoint.config, chosen_device(device)
        counts = np.array(checkpoint.counts, dtype=np.int64)
        scale = build_objective(config, counts).logit_scale
        network = checkpoint.build_model(judged=True).to(where).eval()
        head = network.head
        offset = adjust_logits(torch.zeros(len(counts)), counts, config.posthoc_tau)
        network.head = AffineHead(head, scale, offset.to(where))
        calibration, file = None, calibration_path(path)
        if calibrated and file.is_file():
            calibration = Calibration.load(file)
            calibration.check_weights(weights_hash(network.features, head), file)
            network.head = calibration.head(TrainedHead(head, scale, counts)).to(where)
        groups = {name: tuple(members) for name, members in checkpoint.groups.items()}
        names = tuple(checkpoint.class_names)
        return cls(
            path, checkpoint, network, head, scale, names, counts, groups, where, calibration
        )

    @cached_property
    def preprocessing(self) -> Preprocessing | None:
        """How an image file becomes the input of the network; None where that is unknown.

        It is unknown for data made in Python, whose transforms are the user's own. Checkpoints of
        older versions do not store it; then it comes from the data set.

        Raises:
            DataError: the data set is needed, and is missing or damaged.
        """
        stored = self.checkpoint.preprocessing
        if stored is not None or is_given(self.checkpoint.config.data):
            return stored
        return self.data().test.preprocessing

    def known_preprocessing(self) -> Preprocessing:
        """Return :attr:`preprocessing`.

        Raises:
            DataError: it is unknown, or the data set is needed and is missing or damaged.
        """
        if self.preprocessing is None:
            raise DataError(
                f"how image files become inputs of {self.path} is unknown: its data set, "
                f"{self.checkpoint.config.data}, was made in Python; pass tensors that you prepare "
                "as in training to TrainedRun.load(RUN).network"
            )
        return self.preprocessing

    def data(self, *, progress: bool = False) -> LongTailData:
        """Load the data set that the run was trained on.

        Args:
            progress: show progress: a bar on a terminal, a line a minute elsewhere.

        Raises:
            DataError: it is missing or damaged.
        """
        return load_configured(self.checkpoint.config, progress=progress)
