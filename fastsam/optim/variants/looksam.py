"""LookSAM: the second gradient is computed at every k-th step and reused in between."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from fastsam.kernels.backends import sum_dtype, widened
from fastsam.optim._engine import sharding
from fastsam.optim._engine.fused import fused_rule
from fastsam.optim._engine.policy import COUNTER as ATTEMPTED
from fastsam.optim.passes import Need, Passes
from fastsam.optim.sam import SAM
from fastsam.optim.variants.base import (
    COUNTER,
    Option,
    Update,
    WrappedOptimizer,
    refuse_unsupported,
)

_PAPER = "Liu et al. 2022"
_DIRECTION = "flat_direction"


class LookSAM(WrappedOptimizer):
    """Implements LookSAM: SAM at every ``every``-th step, and a reused direction in between.

    Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization" (CVPR 2022), algorithm
    1. A SAM step stores the part of the second gradient that is orthogonal to the first,
    ``g_v = g_s - ||g_s|| cos(g, g_s) g / ||g||``. The other steps compute one gradient and use
    ``g + alpha ||g|| / ||g_v|| g_v``.

    The SAM steps are those of :class:`fastsam.SAM` with ``interval=every``, counted from ``start``. Before
    ``start``, from ``stop`` on, and while rho is 0, a step is the base optimizer's, and the stored direction
    is deleted.

    ``step`` returns the loss at the weights before the step.

    A step with gradients that are not finite is skipped as in :class:`fastsam.SAM`, and keeps the direction
    of the previous SAM step. A parameter without a gradient at a SAM step has no direction until the next.

    All parameters have a direction, including those in groups with ``perturb=False``. The direction is what
    the second pass of a SAM step adds to the gradient, and perturbing some layers changes the gradients of
    the others.

    Args:
        optimizer: the base optimizer.
        rho: radius of the ascent step. Default 0.05.
        every: number k of steps from one SAM step to the next; 5 to 10 in the paper. Stored as ``interval``
            in the parameter groups. Default 5.
        alpha: weight of the stored direction. Default 0.3, our choice. The paper's 0.7 is tuned for vision
            transformers; on the long-tailed digits (``digits-lt``) it lowered the accuracy on the rare
            classes from 77 to 54 percent.
        start: as in :class:`fastsam.SAM`.
        stop: as in :class:`fastsam.SAM`.
        first_attempt: as in :class:`fastsam.SAM`.
        process_group: ranks that ascend on their own gradients, as in :class:`fastsam.SAM`. The direction is
            orthogonal to the mean of these gradients and equal on all ranks, which costs one more all-reduce
            of a gradient in each SAM step.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = LookSAM(torch.optim.SGD(model.parameters(), lr=0.1), every=5)
        >>> for need in optimizer.passes():
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 3)).square().mean().backward()
    """

    declared: ClassVar = {
        "every": Option(low=1, whole=True, source=f"5 to 10, {_PAPER}"),
        "alpha": Option("look_alpha", source=f"0.7, {_PAPER}"),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        rho: float = 0.05,
        every: int = 5,
        alpha: float = 0.3,
        start: int = 0,
        stop: int | None = None,
        first_attempt: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._check(optimizer, {"every": every, "alpha": alpha})  # before SAM changes anything
        self.sam = SAM(
            optimizer=optimizer,
            rho=rho,
            start=start,
            interval=every,
            stop=stop,
            first_attempt=first_attempt,
            process_group=process_group,
        )
        super().__init__(self.sam, every=every, alpha=alpha)
        # An earlier SAM around the same optimizer left its interval in the groups, where it would win.
        for group in self.param_groups:
            group["interval"] = every

    @property
    def every(self) -> int:
        """Number of steps from one SAM step to the next."""
        return int(self.param_groups[0]["interval"])

    @torch.no_grad()
    def _passes(self, update: Update) -> Passes:
        due, phase, ranks = self.sam.ascent_due, self.sam.policy.phase(), self.sam.peers
        try:
            # Ranks that disagree would wait for each other in a later pass.
            self.sam.policy.agree(self.sam.process_group)
            yield Need(local=due and ranks is not None, ascent=due)
            gradients = [(p, p.grad) for _, p in self._parameters() if p.grad is not None]
            if not gradients:
                raise RuntimeError(
                    "no parameter has a gradient: the closure must run forward and backward, and "
                    "return the loss"
                )
            refuse_unsupported(p for p, _ in gradients)
            if due:
                _refuse_mixed(gradients)
                ascent = [(p, gradient.clone()) for p, gradient in gradients]
                self.sam.first_step()
                if ranks is not None:
                    sharding.all_reduce_mean([gradient for _, gradient in ascent], ranks)
                yield Need()
                directions = self._directions()
                found = _flat_directions(ascent, directions)
            else:
                directions, found = (self._directions() if phase else {}), {}
                if directions:
                    self._add_directions(directions, _norm([gradient for _, gradient in gradients]))
            update(partial(self._step_sam, directions, found))
        finally:
            self.sam.restore()

    def _add_directions(self, directions: Mapping[Tensor, Tensor], norm: Tensor) -> None:
        """Add alpha times the norm of the gradient times the direction to each gradient."""
        length = torch.where(norm.isfinite(), norm, 0.0)
        for group in self.param_groups:
            scale = group["look_alpha"] * length
            for p in group["params"]:
                if p.requires_grad and p.grad is not None and p in directions:
                    p.grad.addcmul_(directions[p], scale.to(p.grad))

    def _step_sam(self, kept: dict[Tensor, Tensor], found: dict[Tensor, Tensor]) -> None:
        """Make SAM's update with the directions taken out of the state, and store them again afterwards.

        Many base optimizers initialize the state of a parameter only if it is empty.

        Args:
            kept: directions to store again.
            found: new directions, which are discarded if the host knows that the step was skipped.
        """
        for p in self._directions():
            del self.state[p][_DIRECTION]
        skipped = self._skips_that_the_host_knows()
        directions = dict(kept)
        try:
            self.sam.second_step()
            if skipped == self._skips_that_the_host_knows():
                directions |= found
        finally:
            for p, direction in directions.items():
                self.state[p][_DIRECTION] = direction

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        if not any(COUNTER in group for group in groups):
            # A checkpoint of SAM: its interval must not replace LookSAM's.
            groups = [{k: v for k, v in group.items() if k != "interval"} for group in groups]
        elif not any(ATTEMPTED in group for group in groups):
            # A checkpoint of a version in which only LookSAM counted steps.
            groups = [{**group, ATTEMPTED: group[COUNTER]} for group in groups]
        super()._unpack({**state_dict, "param_groups": groups})

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step with an infinite or NaN gradient leaves the weights unchanged; always True."""
        return self.sam.skips_nonfinite_steps

    @property
    def skipped_steps(self) -> Tensor:
        """Number of updates skipped for a non-finite gradient: int64 scalar on the parameters' device."""
        return self.sam.skipped_steps

    def _skips_that_the_host_knows(self) -> int:
        """Return the number of skipped steps for a base without a fused update, and 0 for a fused one.

        A base without a fused update may still have no state after a skipped step. A direction alone would
        then look like initialized state to torch's optimizers when they are copied or loaded, so new
        directions must be discarded. A fused base creates its state even in a skipped step; its counter is
        not read, because that would make the host wait for the device.
        """
        fused = fused_rule(self.sam.base_optimizer) is not None
        return 0 if fused else int(self.sam.skipped_steps)

    def _directions(self) -> dict[Tensor, Tensor]:
        return {p: state[_DIRECTION] for p, state in self.state.items() if _DIRECTION in state}


def _refuse_mixed(gradients: list[tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError unless all parameters are on one device, and all are DTensors of one mesh or none is.

    The direction takes inner products over all parameters.
    """
    kinds = {(p.device, getattr(p, "device_mesh", None)) for p, _ in gradients}
    if len(kinds) > 1:
        described = " and ".join(sorted(f"{device}, mesh {mesh}" for device, mesh in kinds))
        raise ValueError(
            "LookSAM requires parameters on one device that are all sharded over one mesh or all whole, got "
            f"{described}; use SAM, or make the other parameters DTensors of the mesh, too"
        )


def _flat_directions(
    ascent: list[tuple[Tensor, Tensor]], before: dict[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Return the part of the new gradients that is orthogonal to the old ones, normalized to length 1.

    If it is not finite, return the previous direction, or 0 without one. ``torch.where`` selects on the
    device, so the host does not wait.

    Args:
        ascent: parameters with their old gradients; the new ones are in ``grad``.
        before: the previous directions.
    """
    both = [(p, old, p.grad) for p, old in ascent if p.grad is not None]
    norm = _norm([old for _, old in ascent])
    # Divide first: the product of two small gradients, or the square of a norm, may underflow.
    product = sum(
        (torch.sum(widened(old) / norm * widened(new)) for _, old, new in both), norm.new_zeros(())
    )
    share = torch.where(norm > 0, product / norm, 0.0)
    parts = [torch.addcmul(new, old, -share.to(old)) for _, old, new in both]
    length = _norm(parts)
    finite = norm.isfinite() & length.isfinite()
    length = torch.where(length > 0, length, 1.0)
    return {
        p: torch.where(finite, part.div_(length.to(part)), before.get(p, 0.0))
        for (p, _, _), part in zip(both, parts, strict=True)
    }


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return the joint norm of all tensors in the dtype of :func:`widened`; 0 for an empty list."""
    if not tensors:
        return torch.zeros((), device="cpu")
    norms = [
        torch.linalg.vector_norm(tensor, dtype=sum_dtype(tensor.device, tensor.dtype))
        for tensor in tensors
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
