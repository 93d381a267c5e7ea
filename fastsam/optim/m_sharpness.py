"""Micro-batches of one step that climb on their own gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsam.optim.sam import SAM


def m_sam_step(optimizer: SAM, closures: Sequence[Callable[[], Tensor]]) -> Tensor:
    """Make one step in which every micro-batch climbs on its own gradient: m-sharpness in one process.

    Foret et al. 2021, section 4.1: the smaller the part of the batch that a perturbation is computed from,
    the better the weights generalize. For each closure the weights climb on its gradient, the gradient at
    the top is computed, and the weights return. The update uses the mean of the gradients at the tops. See
    :func:`local_sam_step` for ranks that each climb on their own gradient. Where no ascent is due, each
    closure makes one pass, and the update uses the mean of the gradients at the weights.

    A gradient that is not finite, of any micro-batch and in either pass, skips the whole update. Memory for
    one more gradient is needed, in float32 where gradients have 16 bits.

    Args:
        optimizer: its gradients from before the call are dropped, and it has none afterwards.
        closures: one for each micro-batch: runs forward and backward over it and returns its loss. Each is
            called once for each pass, with gradients enabled and cleared. Give the micro-batches the same
            size, or weight their losses: all closures count the same.

    Returns:
        The mean of the losses at the weights before the step, detached.

    Raises:
        TypeError: ``optimizer`` is no SAM, or a closure returned no tensor.
        ValueError: there is no closure.
        RuntimeError: a step is open already, or a closure left no gradient. Whatever a closure raises, the
            weights are restored.

    Example:
        >>> import torch
        >>> from fastsam import SAM
        >>> from fastsam.optim import m_sam_step
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SAM([weight], torch.optim.SGD, rho=0.1, lr=0.1)
        >>> def loss_of(target):
        ...     loss = (weight - target).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> m_sam_step(optimizer, [lambda: loss_of(0.0), lambda: loss_of(3.0)])
        tensor(5.)
    """
    if not isinstance(optimizer, SAM):
        raise TypeError(f"m_sam_step makes a step of fastsam.SAM, got {type(optimizer).__name__}")
    if not closures:
        raise ValueError("m_sam_step needs one closure for each micro-batch, got none")
    if optimizer.policy.begun:
        raise RuntimeError(
            "m_sam_step() between first_step() and second_step(): finish the open step, or give it up with "
            "restore(), first"
        )
    optimizer.policy.agree(
        optimizer.process_group
    )  # before the ranks make passes that they must share
    due = optimizer.ascent_due
    sums: dict[Tensor, Tensor] = {}
    losses: list[Tensor] = []
    broken: Tensor | None = None
    try:
        for closure in closures:
            if losses:
                optimizer.restore()
                optimizer.policy.decide(due)
            losses.append(_loss_of(closure, optimizer))
            optimizer.first_step()
            if due:
                broken = _flag(optimizer.ascent_norm, broken)
                _loss_of(closure, optimizer)
                optimizer.return_to_weights()
            _add_gradients(optimizer, sums)
        # The update belongs to the open step, that of the last micro-batch.
        for parameter, total in sums.items():
            parameter.grad = total.div_(len(closures)).to(parameter.dtype)
        if broken is not None:
            optimizer.native_step.skip_where(broken)
        optimizer.second_step(zero_grad=True)
    except BaseException:
        optimizer.restore()
        raise
    return torch.stack(losses).mean()


def _loss_of(closure: Callable[[], Tensor], optimizer: SAM) -> Tensor:
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"a closure of m_sam_step returned {loss!r}; expected a closure that runs forward and backward, "
            "and returns the loss"
        )
    return loss.detach()


def _flag(norm: Tensor, before: Tensor | None) -> Tensor:
    """Return 1 where a norm so far was not finite: every ascent clears the optimizer's own flag."""
    flag = norm.isfinite().logical_not().float()
    return flag if before is None else torch.maximum(flag, before)


def _add_gradients(optimizer: SAM, sums: dict[Tensor, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    present = [(p, p.grad) for p in parameters if p.grad is not None]
    if not present:
        raise RuntimeError(
            "a closure of m_sam_step left no gradient when it was called at the perturbed weights; expected "
            "one that runs forward and backward in every call"
        )
    for parameter, gradient in present:
        if parameter in sums:
            sums[parameter].add_(gradient)
        else:
            # A copy: DistributedDataParallel keeps writing to the memory of its gradients.
            dtype = torch.float32 if gradient.element_size() == 2 else gradient.dtype
            sums[parameter] = gradient.detach().to(dtype, copy=True)
