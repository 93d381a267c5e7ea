"""The mean loss of single classes, in a form that a spectrum can differentiate: images and loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsam.curvature import BatchLoss
from fastsam.longtail.build import build_objective
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import Batch, Draw, Images, LongTailData
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import CrossEntropyLoss
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.objective import Given, Term

_BATCH = 256


@dataclass(eq=False)
class ClassReader:
    """The images of one class as an iterable of ``(inputs, targets)`` batches.

    Attributes:
        images: images of all classes.
        members: indices of those of the class.
        draws: number of fixed augmented copies of each image; 0 for clean images, None for a new augmentation
            at every read.
        seed: seed of the augmentation.
        device: device of the batches.
    """

    images: Images
    members: Any
    draws: int | None
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self._fresh = itertools.count(1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        cuts = range(_BATCH, len(self.members), _BATCH)
        order = np.array_split(self.members, cuts)
        if self.draws == 0:
            epochs: Iterable[int] = (0,)
        elif self.draws is None:
            epochs = (next(self._fresh),)
        else:
            epochs = range(1, self.draws + 1)
        for epoch in epochs:
            for batch in self.images.batches(
                order, Draw(self.seed, epoch) if epoch > 0 else None, self.device
            ):
                yield batch.inputs, batch.targets


def class_loss(
    name: str, config: TrainConfig, data: LongTailData, model: Classifier
) -> nn.Module | BatchLoss:
    """Return cross-entropy (``ce``) or the loss of the last epoch, in a form that a spectrum can average."""
    objective = build_objective(config, data.counts, device=next(model.parameters()).device)
    scale = objective.logit_scale if name == "ce" else 1.0
    if name == "ce" and scale == 1.0:
        return nn.CrossEntropyLoss()
    term: Term = CrossEntropyLoss()
    if name != "ce":
        terms = objective.at(config.epochs)
        if objective.couples_batch or len(terms) != 1:
            raise UsageError(
                f"loss 'as-trained' requires a mean over samples, which the loss of {config.method} is not; "
                "pass --loss ce"
            )
        term = terms[0][0].eval()

    def sums(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        features = model.features(inputs)
        outputs = Outputs(features, scale * model.head(features))
        part = Batch((inputs,), targets, targets)
        losses = term.loss(outputs, part, Given(model))
        return losses, term.divisor(part).to(losses)

    return BatchLoss(sums)
