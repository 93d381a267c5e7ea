"""Predictions of a network for a dataset split."""

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
from fastsam.longtail.precision import Precision, autocast
from fastsam.upload import upload


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for N images. Logits are not kept, because there may be thousands of classes.

    Attributes:
        classes: most probable class, int64 ``[N]``.
        confidence: probability of the most probable class, float32 ``[N]``.
        rank: number of classes that are more probable than the true class, int64 ``[N]``.
        nll: negative log-probability of the true class, in nats, float32 ``[N]``.
        targets: true class, int64 ``[N]``.
    """

    classes: Tensor
    confidence: Tensor
    rank: Tensor
    nll: Tensor
    targets: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Predictions:
        """Create predictions from logits ``[N, C]`` and true classes, int64 ``[N]``."""
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
        """Whether each prediction is correct, bool ``[N]``."""
        return self.classes == self.targets

    @property
    def accuracy(self) -> float:
        """Accuracy in percent."""
        return 100.0 * int(self.right.sum()) / len(self.targets)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes that have images of the accuracy of each class, in percent."""
        images = self.targets.bincount().double()
        right = self.targets[self.right].bincount(minlength=len(images))
        return 100.0 * float((right / images)[images > 0].mean())


def view_logits(model: Classifier, inputs: Tensor) -> Tensor:
    """Return the logits of images, averaged over their views, as float32 ``[B, C]``.

    Args:
        model: the network.
        inputs: images ``[B, channels, H, W]``, or several views of each, ``[B, views, channels, H, W]``. The
            network sees one view at a time.
    """
    if inputs.ndim == 4:
        logits: Tensor = model(inputs)
        return logits.float()
    return torch.stack([model(view).float() for view in inputs.unbind(dim=1)]).mean(dim=0)


@torch.no_grad()
def predict(
    model: Classifier,
    images: Images,
    device: torch.device,
    *,
    batch_size: int,
    adjust: Callable[[Tensor], Tensor] | None = None,
    labels: NDArray[np.int64] | None = None,
    precision: Precision = "float32",
    world: World = World(),  # noqa: B008 (frozen)
) -> Predictions:
    """Compute predictions for all readable images, in evaluation mode. The result is on the CPU.

    Args:
        model: the network; its training mode is restored.
        images: the images.
        device: device of the network.
        batch_size: images per batch and process.
        adjust: maps logits ``[B, C]`` to adjusted logits; None for no adjustment.
        labels: the network's label of each class of ``images``; None if the labels are the same.
        precision: precision of the forward passes.
        world: the ranks that share the work. Each rank returns all predictions.

    Raises:
        DataError: if no image can be read.
        TrainingError: if a logit is infinite or NaN, because its predicted class would be arbitrary.
    """
    truth = torch.from_numpy(images.targets if labels is None else labels[images.targets])
    on_device = upload(truth, device)
    training = model.training
    model.eval()
    share = np.arange(world.rank, len(images), world.world_size)
    # A pass of a sharded network requires all ranks, so a rank with one image less reads the first one too.
    pads = world.rank >= len(images) % world.world_size > 0
    share = np.append(share, 0) if pads else share
    order = np.array_split(share, range(batch_size, len(share), batch_size))
    # Columns: class, confidence, rank, nll, whether the image was read, whether its logits are finite.
    # Rows of other ranks stay zero, so the all-reduce below merges them.
    found = torch.zeros(len(images), 6, dtype=torch.float64, device=device)
    try:
        for batch in images.batches(order, None, device):
            with autocast(precision, device):
                logits = view_logits(model, batch.inputs)
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
    if pads:
        found[0] = 0  # the row belongs to rank 0
    world.all_reduce([found])
    classes, confidence, rank, nll, seen, finite = found.cpu().unbind(dim=1)
    known = seen > 0
    if not known.any():
        raise DataError("no image of an evaluation set could be read; check its files")
    wrong = int((finite < seen).sum())
    if wrong:
        raise TrainingError(
            f"cannot evaluate the network: its outputs are infinite or NaN for {wrong} of "
            f"{int(known.sum())} images; check the images for such values or train again with a lower "
            "learning rate"
        )
    return Predictions(
        classes[known].long(),
        confidence[known].float(),
        rank[known].long(),
        nll[known].float(),
        truth[known],
    )
