"""Totals of an epoch: loss and accuracy."""

from __future__ import annotations

import math

import torch

from fastsam.distributed import World
from fastsam.longtail.errors import TrainingError
from fastsam.longtail.training.step import Step


class EpochTotals:
    """Sums over the steps of an epoch.

    They stay on the device, because reading them after every batch would synchronize with it.

    Args:
        device: device of the steps.
        skips: whether the optimizer skips steps with infinite or NaN gradients. The loss of a skipped step
            is then not counted.
    """

    def __init__(self, device: torch.device, *, skips: bool) -> None:
        self.steps = 0
        self._skips = skips
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        # Number of images that are classified correctly, that were seen, and whose loss is counted.
        self._counted = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, step: Step) -> None:
        """Add the outputs of a step for one batch."""
        images = len(step.targets)
        known = step.loss.isfinite() | (not self._skips)
        self._loss += torch.where(known, step.loss.double() * images, 0.0)
        self._counted += torch.stack(
            [
                (step.logits.argmax(dim=1) == step.targets).sum(),
                torch.full_like(known, images, dtype=torch.int64),
                known * images,
            ]
        )

    def finish(self, world: World, *, epoch: int, skipped: int, where: str) -> tuple[float, float]:
        """Return the mean loss and the accuracy in percent over all ranks.

        Args:
            world: the ranks of the run.
            epoch: epoch, counted from 1, for messages.
            skipped: number of updates that were skipped in the epoch.
            where: learning rate and rho, for messages.

        Raises:
            TrainingError: if no image could be read, at least half of the updates were skipped, or the loss
                is infinite or NaN.
        """
        world.all_reduce([self._loss, self._counted])
        right, seen, with_loss = self._counted.tolist()
        if seen == 0:
            raise TrainingError(f"no image of epoch {epoch} could be read; check the files")
        mean = float(self._loss) / max(with_loss, 1)
        if 2 * skipped >= self.steps or not math.isfinite(mean):
            what = (
                f"the loss is {mean}"
                if 2 * skipped < self.steps
                else f"gradients were infinite or NaN in {skipped} of {self.steps} steps"
            )
            raise TrainingError(
                f"{what} in epoch {epoch}; train again (--overwrite) with a lower {where}"
            )
        return mean, 100.0 * right / seen
