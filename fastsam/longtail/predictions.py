"""Predictions of a network for the images of a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastsam.distributed import World
from fastsam.longtail.data import Images
from fastsam.longtail.errors import DataError, TrainingError
from fastsam.longtail.models.classifier import Classifier
from fastsam.upload import upload


@dataclass(frozen=True, eq=False)
class Predictions:
    """The answer for each of N images; logits of thousands of classes are not kept.

    Attributes:
        classes: most probable class, int64 ``[N]``.
        confidence: its probability, float32 ``[N]``.
        rank: number of classes that are more probable than the true one, int64 ``[N]``.
        nll: negative log probability of the true class, in nats, float32 ``[N]``.
        targets: the truth, int64 ``[N]``.
    """

    classes: Tensor
    confidence: Tensor
    rank: Tensor
    nll: Tensor
    targets: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Predictions:
        """The predictions that logits ``[N, C]`` make where the truth is ``targets``, int64 ``[N]``."""
        logits = logits.float()
        true = logits.gather(1, targets[:, None])
        return cls(
            logits.argmax(dim=1),
            logits.softmax(dim=1).amax(dim=1),
            (logits > true).sum(dim=1),
            functional.cross_entropy(logits, targets, reduction="none"),
            targets,
        )

    @property
    def right(self) -> Tensor:
        """Where the answer is right, bool ``[N]``."""
        return self.classes == self.targets

    @property
    def accuracy(self) -> float:
        """Percent right."""
        return 100.0 * int(self.right.sum()) / len(self.targets)


@torch.no_grad()
def predict(
    model: Classifier,
    images: Images,
    device: torch.device,
    *,
    batch_size: int,
    adjust: Callable[[Tensor], Tensor] | None = None,
    labels: NDArray[np.int64] | None = None,
    world: World = World(),  # noqa: B008 (frozen)
) -> Predictions:
    """Predictions for all images that can be read, in evaluation mode, on the CPU.

    Args:
        model: the network; it is left in the mode in which it was.
        images: what to look at.
        device: where the network is.
        batch_size: images in a batch of one process.
        adjust: what is done to logits ``[B, C]`` first.
        labels: the network's number of each class of ``images``; None where they number them alike.
        world: this process among those that share the work; each gets all predictions.

    Raises:
        DataError: if no image could be read.
        TrainingError: if a logit is infinite or NaN: its class would be the first, by accident.
    """
    truth = torch.from_numpy(images.targets if labels is None else labels[images.targets])
    on_device = upload(truth, device)
    training = model.training
    model.eval()
    share = np.arange(world.rank, len(images), world.world_size)
    order = np.array_split(share, range(batch_size, len(share), batch_size))
    # Columns: class, confidence, rank, nll, whether it was seen, and whether its logits are finite.
    # Everyone adds what it has.
    found = torch.zeros(len(images), 6, dtype=torch.float64, device=device)
    try:
        for batch in images.batches(order, None, device):
            logits = model(batch.inputs)
            logits = logits if adjust is None else adjust(logits)
            part = Predictions.of(logits, on_device[batch.indices])
            seen = torch.ones_like(part.confidence)
            finite = logits.isfinite().all(dim=1)
            columns = (
                part.classes,
                part.confidence.nan_to_num(),
                part.rank,
                part.nll.nan_to_num(),
                seen,
                finite,
            )
            found[batch.indices] = torch.stack([column.double() for column in columns], dim=1)
    finally:
        model.train(training)
    world.all_reduce([found])
    classes, confidence, rank, nll, seen, finite = found.cpu().unbind(dim=1)
    known = seen > 0
    if not known.any():
        raise DataError("no image of an evaluation set could be read")
    wrong = int((finite < seen).sum())
    if wrong:
        raise TrainingError(
            f"the network's outputs are infinite or NaN for {wrong} of {int(known.sum())} images of an "
            "evaluation set, so it cannot be judged; look for such values in the images, or train again "
            "with a lower learning rate"
        )
    return Predictions(
        classes[known].long(),
        confidence[known].float(),
        rank[known].long(),
        nll[known].float(),
        truth[known],
    )
