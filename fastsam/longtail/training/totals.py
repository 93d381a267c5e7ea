"""Totals of an epoch: loss, accuracy, cost and pace."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsam.distributed import World
from fastsam.longtail.data import Batch
from fastsam.longtail.errors import TrainingError
from fastsam.longtail.results import Epoch
from fastsam.longtail.runtime import peak_memory
from fastsam.longtail.training.step import Step, Stepper


class EpochTotals:
    """Sums over the steps of an epoch.

    They stay on the device, because reading them after every batch would synchronize with it.

    Args:
        stepper: takes the steps. If it skips steps with infinite or NaN gradients, the loss of a skipped step
            is not counted.
        device: device of the steps.
    """

    def __init__(self, stepper: Stepper, device: torch.device) -> None:
        self.steps = 0
        self._compiling = stepper.engine.clock
        self._compiled = 0.0 if self._compiling is None else self._compiling.seconds
        self._stepper = stepper
        self._device = device
        self._skips = stepper.skips_nonfinite_steps
        self._skipped, self._excused = stepper.skipped_steps, stepper.excused_steps
        self._gradients = stepper.gradients
        self._began = time.perf_counter()
        self._waited = 0.0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        # Number of images that are classified correctly, that were seen, and whose loss is counted. A mixed
        # image counts as correct with the share of the predicted class.
        self._counted = torch.zeros(3, dtype=torch.float64, device=device)

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began."""
        return time.perf_counter() - self._began

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over ``batches``, and add up the time for which the caller waits for them."""
        stream = iter(batches)
        while True:
            began = time.perf_counter()
            with self._stepper.section("data"):
                batch = next(stream, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def add(self, step: Step) -> None:
        """Add the outputs of a step for one batch."""
        images = len(step.targets)
        known = step.loss.isfinite() | (not self._skips)
        self._loss += torch.where(known, step.loss.double() * images, 0.0)
        self._counted += torch.stack(
            [
                _correct(step),
                torch.full_like(known, images, dtype=torch.float64),
                known.double() * images,
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the totals of this rank so far; waits for the device."""
        return {
            "steps": self.steps,
            "loss": float(self._loss),
            "counted": self._counted.tolist(),
            "skipped": self._stepper.skipped_steps - self._skipped,
            "excused": self._stepper.excused_steps - self._excused,
            "gradients": self._stepper.gradients - self._gradients,
            "compiled": 0.0
            if self._compiling is None
            else self._compiling.seconds - self._compiled,
            "seconds": self.seconds,
            "waited": self._waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the totals of an interrupted epoch, before its next step."""
        self.steps = state["steps"]
        self._loss.fill_(state["loss"])
        self._counted.copy_(torch.tensor(state["counted"], dtype=torch.float64))
        self._skipped -= state["skipped"]
        self._excused -= state["excused"]
        self._gradients -= state["gradients"]
        self._compiled -= state["compiled"]
        self._began -= state["seconds"]
        self._waited = state["waited"]

    def record(self, world: World, *, epoch: int, lr: float, rho: float | None) -> Epoch:
        """Return the record of the epoch after its last step, before the evaluation.

        Loss, accuracy and images per second are those of all ranks; waiting time and memory are those of this
        rank.

        Args:
            world: the ranks of the run.
            epoch: epoch, counted from 1.
            lr: learning rate of the epoch.
            rho: radius of the ascent step; None for optimizers without an ascent step.

        Raises:
            TrainingError: if no image could be read, the loss is infinite or NaN, or at least half of the
                updates were skipped. Updates that only lowered the loss scale do not count as skipped here.
        """
        skipped = self._stepper.skipped_steps - self._skipped
        failed = skipped - (self._stepper.excused_steps - self._excused)
        world.all_reduce([self._loss, self._counted])
        right, seen, with_loss = self._counted.tolist()  # waits for the device
        seconds = self.seconds
        compiling = None if self._compiling is None else self._compiling.seconds - self._compiled
        if seen == 0:
            raise TrainingError(f"no image of epoch {epoch} could be read; check the files")
        mean = float(self._loss) / max(with_loss, 1)
        if 2 * failed >= self.steps or not math.isfinite(mean):
            what = (
                f"the loss is {mean}"
                if 2 * failed < self.steps
                else f"gradients were infinite or NaN in {failed} of {self.steps} steps"
            )
            raise TrainingError(
                f"{what} in epoch {epoch}; train again with a lower learning rate (now {lr:g})"
                + ("" if rho is None else f" or rho (now {rho:g})")
            )
        gradients = self._stepper.gradients - self._gradients
        return Epoch(
            epoch=epoch,
            lr=lr,
            rho=rho,
            loss=mean,
            train_accuracy=100.0 * right / seen,
            validation_accuracy=None,
            seconds=seconds,
            skipped=skipped,
            gradients=round(gradients, 6),
            gradients_per_step=round(gradients / self.steps, 6),
            images_per_second=round(seen / (seconds - (compiling or 0.0)), 3),
            waiting=round(self._waited / seconds, 6),
            compile_seconds=None if compiling is None else round(compiling, 3),
            memory=peak_memory(self._device),
        )


def _correct(step: Step) -> Tensor:
    """Return the number of images that are classified correctly, a float64 scalar."""
    predicted = step.logits.argmax(dim=1)
    correct = (predicted == step.targets).double()
    if step.second is not None and step.share is not None:
        correct = correct.lerp((predicted == step.second).double(), 1 - step.share.double())
    return correct.sum()
