"""m-sharpness in one process: each micro-batch of a step has its own ascent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsam.optim.sam import SAM


def m_sam_step(optimizer: SAM, closures: Sequence[Callable[[], Tensor]]) -> Tensor:
    """Make one SAM step in which every micro-batch perturbs the weights along its own gradient.

    This is m-sharpness (Foret et al. 2021, section 4.1): the fewer samples a perturbation is computed from,
    the better the weights generalize. For each closure, the weights are perturbed along its gradient, the
    gradient at the perturbed weights is computed, and the weights are restored. The update uses the mean of
    these gradients. If no ascent is due, each closure makes one pass, and the update uses the mean of the
    gradients at w. See :func:`local_sam_step` for one ascent per rank.

    A gradient that is not finite, of any micro-batch in either pass, skips the whole update. The step needs
    memory for one more gradient, in float32 if gradients have 16 bits.

    Args:
        optimizer: the optimizer. Existing gradients are discarded, and none are left after the step.
        closures: one per micro-batch. Each runs forward and backward and returns the loss; it is called once
            per pass, with gradients enabled and cleared. All closures have equal weight: use micro-batches
            of one size, or weight their losses.

    Returns:
        Mean of the losses at the weights before the step, detached.

    Raises:
        TypeError: ``optimizer`` is not a SAM optimizer, or a closure did not return a tensor.
        ValueError: ``closures`` is empty.
        RuntimeError: ``first_step`` was called before, or a closure left no gradient. After any error,
            including one that a closure raises, the weights are restored.

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
        raise TypeError(f"m_sam_step requires a fastsam.SAM, got {type(optimizer).__name__}")
    if not closures:
        raise ValueError("m_sam_step requires one closure per micro-batch, got none")
    if optimizer.policy.begun:
        raise RuntimeError(
            "m_sam_step() was called between first_step() and second_step(): finish that step, or abandon it "
            "with restore(), first"
        )
    # Ranks that disagree would wait for each other in a later pass, so compare them before the first one.
    optimizer.policy.agree(optimizer.process_group)
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
        # The last micro-batch's step is still open; it makes the update, for all of them.
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
            f"a closure of m_sam_step returned {loss!r}; expected the loss, a tensor, after a forward and a "
            "backward pass"
        )
    return loss.detach()


def _flag(norm: Tensor, before: Tensor | None) -> Tensor:
    """Return 1 if any norm so far was not finite. Each ascent clears the optimizer's own flag."""
    flag = norm.isfinite().logical_not().float()
    return flag if before is None else torch.maximum(flag, before)


def _add_gradients(optimizer: SAM, sums: dict[Tensor, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    present = [(p, p.grad) for p in parameters if p.grad is not None]
    if not present:
        raise RuntimeError(
            "a closure of m_sam_step left no gradient in its last pass; it must run forward and backward in "
            "every call"
        )
    for parameter, gradient in present:
        if parameter in sums:
            sums[parameter].add_(gradient)
        else:
            # Copy: DistributedDataParallel reuses the memory of its gradients in the next pass.
            dtype = torch.float32 if gradient.element_size() == 2 else gradient.dtype
            sums[parameter] = gradient.detach().to(dtype, copy=True)
