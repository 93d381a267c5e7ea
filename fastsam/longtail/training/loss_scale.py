"""Loss scaling for training in float16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.distributed import World
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig


class LossScale(torch.amp.GradScaler):
    """torch's ``GradScaler`` for steps of several passes, which share one scale and one decision to skip.

    In float16, gradients below 6e-8 are 0. The loss is therefore multiplied by a scale before each backward
    pass, and the gradients are divided by it right after. The scale is a power of two, so both are exact. An
    overflow in any pass of a step halves the scale once; 2000 steps without one double it.

    ``GradScaler`` accepts each optimizer once between two updates of the scale, because one optimizer usually
    means one gradient. A step of SAM has two gradients, and other optimizers have more. So each pass is
    unscaled under its own :class:`_Pass`, and :meth:`update` combines what all of them found.

    A skipped step is excused if the scale was the cause: its losses were finite and the scale was above 1.
    The first steps of a run search for the scale in this way. A step that is skipped for another reason would
    be skipped at every scale.

    Args:
        device: device of the gradients.
        world: the ranks of the run, which skip a step together.

    Attributes:
        skipped_steps: number of steps with an overflow: int64 scalar on the device.
        excused_steps: number of those that the scale caused: int64 scalar on the device.
    """

    def __init__(self, device: torch.device, world: World) -> None:
        super().__init__(device.type)
        self._world = world
        self._passes: list[_Pass] = []
        self._flags: list[Tensor] = []
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.excused_steps = torch.zeros((), dtype=torch.int64, device=device)

    @classmethod
    def of_run(cls, config: TrainConfig, device: torch.device, world: World) -> LossScale | None:
        """Create the loss scale of a run; return None if its precision is not float16."""
        return cls(device, world) if config.precision == "float16" else None

    @torch.no_grad()
    def unscale(self, parameters: Sequence[Tensor], loss: Tensor) -> None:
        """Divide the gradients of one pass by the scale, and look for infinite or NaN values.

        Args:
            parameters: parameters whose ``.grad`` holds the gradient of this pass only.
            loss: the loss of the pass without the scale, a scalar.
        """
        one = _Pass(parameters)
        self._passes.append(one)  # GradScaler knows it by its id, which must stay in use
        self.unscale_(one)  # type: ignore[arg-type]
        for found in self._found_inf_per_device(one).values():  # type: ignore[arg-type]
            flag = torch.stack([found, (~loss.isfinite()).to(found)])
            self._world.all_reduce([flag])  # gradients of a local ascent differ between ranks
            found.copy_(flag[0])
            self._flags.append(flag)

    def overflowed(self) -> bool:
        """Return whether a pass of this step had an infinite or NaN gradient; waits for the device."""
        return bool(torch.stack(self._flags)[:, 0].any())

    @torch.no_grad()
    def finish_step(self) -> None:
        """Count the step, and update the scale for the next one."""
        overflow, spoiled = (torch.stack(self._flags) > 0).any(dim=0)
        scale, _ = self._check_scale_growth_tracker("update")
        self.skipped_steps += overflow
        self.excused_steps += overflow & ~spoiled & (scale > 1)
        self.update()
        self._passes.clear()
        self._flags.clear()


def continue_scale(scale: LossScale | None, checkpoint: Checkpoint) -> None:
    """Continue with the scale in a checkpoint, if it has one and the run uses one."""
    if scale is not None and checkpoint.loss_scale is not None:
        scale.load_state_dict(checkpoint.loss_scale)


class _Pass:
    """One pass in the place of an optimizer: ``GradScaler`` reads only its groups."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": parameters}]
