"""Curvature of the loss of chosen classes while a run trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.curvature import CurvaturePoint, CurvatureTracker
from fastsam.longtail.class_loss import class_loss
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import Images, LongTailData
from fastsam.longtail.errors import CheckpointError, TrainingError, UsageError, unknown
from fastsam.longtail.landscape import ALL
from fastsam.longtail.models.classifier import Classifier


class TrackedCurvature:
    """The measurements of a run with ``track_curvature``; nothing in other runs.

    The loss is cross-entropy without class weights on clean training images, as in ``fastsam spectrum``.

    Args:
        config: settings of the run.
        data: data set of the run.
        model: the network that is trained.
        writes: whether this process measures; with several processes it is rank 0.

    Raises:
        UsageError: if a class does not exist or has no training image.
    """

    def __init__(
        self, config: TrainConfig, data: LongTailData, model: Classifier, *, writes: bool
    ) -> None:
        self._tracker: CurvatureTracker | None = None
        if config.track_curvature is None or not writes:
            return
        images = data.train
        self._tracker = CurvatureTracker(
            model,
            class_loss("ce", config, data, model),
            _CleanImages(images, next(model.parameters()).device),
            every=config.track_curvature,
            budget=config.curvature_budget or None,
            classes=measured_classes(config, data),
            samples=config.curvature_images,
            targets=torch.from_numpy(np.asarray(images.targets)),
            seed=config.seed,
        )

    @property
    def points(self) -> list[CurvaturePoint]:
        """The measurements so far."""
        return [] if self._tracker is None else list(self._tracker.points)

    def step(self, step: int, lr: float) -> None:
        """Measure after ``step`` batches if it is due.

        Raises:
            TrainingError: if the curvature cannot be measured, for instance because the loss is infinite.
        """
        if self._tracker is None:
            return
        try:
            self._tracker.step(step, lr=lr)
        except (ValueError, FloatingPointError) as error:
            raise TrainingError(f"the curvature after {step} batches: {error}") from error

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state for a checkpoint; None in runs without ``track_curvature``."""
        return None if self._tracker is None else self._tracker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from the state in a checkpoint, if it has one.

        Raises:
            CheckpointError: if the state has other classes.
        """
        if self._tracker is None or state is None:
            return
        try:
            self._tracker.load_state_dict(state)
        except ValueError as error:
            raise CheckpointError(
                f"cannot resume the curvature of this run: {error}; use the same --curvature-classes"
            ) from error


def measured_classes(config: TrainConfig, data: LongTailData) -> dict[str, list[int]]:
    """Return the labels that a run with ``track_curvature`` measures, by the name of the class or group.

    Raises:
        UsageError: if there are none, or a class does not exist or has no training image.
    """
    if not config.curvature_classes:
        raise UsageError(
            f"curvature_classes is empty; pass labels, groups or {ALL!r}, such as head tail"
        )
    return {name: _members(name, data) for name in config.curvature_classes}


def _members(name: str, data: LongTailData) -> list[int]:
    """Return the labels of a class, group, or all classes, without those that have no training image."""
    groups = data.group_lists()
    if name == ALL:
        labels = list(range(data.num_classes))
    elif name in groups:
        labels = groups[name]
    elif name.isdecimal() and int(name) < data.num_classes:
        labels = [int(name)]
    else:
        known = (f"0 to {data.num_classes - 1}", *groups, ALL)
        raise unknown("class in curvature_classes", name, known)
    present = [label for label in labels if data.counts[label] > 0]
    if not present:
        raise UsageError(
            f"{name!r} in curvature_classes has no training image in {data.name}; choose another class"
        )
    return present


class _CleanImages:
    """Training images without augmentation, as samples ``(input, target)``."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self._images = images
        self._device = device

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return samples that are read as one batch; a ``DataLoader`` calls this."""
        order = [np.asarray(indices, np.int64)]
        return [
            (inputs, target)
            for batch in self._images.batches(order, None, self._device)
            for inputs, target in zip(batch.inputs, batch.targets, strict=True)
        ]
