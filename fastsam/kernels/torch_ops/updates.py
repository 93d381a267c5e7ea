"""Restore and update of the base optimizer in PyTorch operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastsam.kernels.table import TensorTable
from fastsam.kernels.torch_ops.parts import (
    Part,
    add_product,
    add_scalar,
    arithmetic,
    backup_of,
    parts_of,
    plus_product,
)
from fastsam.kernels.torch_ops.scalars import TorchScalars


@torch.no_grad()
def update(table: TensorTable, scalars: TorchScalars, *, rule: Literal["sgd", "adam"]) -> None:
    """Run :func:`fastsam.kernels.sam.update`."""
    skip = scalars.found_inf[0] != 0
    without = [row for row, gradient in enumerate(table.gradients) if gradient is None]
    restored = [row for row in without if table.backed_up[row]]
    if restored:
        torch._foreach_copy_(
            [table.weights[row] for row in restored],
            [backup_of(table, row) for row in restored],
        )
    make = {"sgd": _update_sgd, "adam": _update_adam}[rule]
    for part in parts_of(table):
        counters = [] if table.steps is None else [table.steps[row] for row in part.rows]
        make(part, scalars, counters, skip)
        if counters:
            add_scalar(counters, (~skip).to(torch.float32))
    if scalars.skipped_steps is not None:
        scalars.skipped_steps.add_(skip)


def _update_sgd(
    part: Part, scalars: TorchScalars, counters: Sequence[Tensor], skip: Tensor
) -> None:
    """Make the update of ``torch.optim.SGD``."""
    weights = arithmetic(part.backups)
    dtype = weights[0].dtype

    def setting(value: Tensor) -> Tensor:
        return value[part.group].to(dtype)

    lr, momentum = setting(scalars.setting("lr")), setting(scalars.setting("momentum"))
    direction = list(
        torch._foreach_mul(arithmetic(part.gradients), setting(scalars.gradient_factor()))
    )
    add_product(direction, weights, setting(scalars.setting("weight_decay")))
    buffers = part.states[0]
    if not buffers:
        result = plus_product(weights, direction, -lr)
    else:
        blend = _blended(part, direction, counters, momentum, scalars.complement("dampening"))
        _store(skip, buffers, blend, buffers)
        # Branching on ``nesterov`` would read it on the host; multiply by 0 or 1 instead.
        nesterov = setting(scalars.setting("nesterov")) != 0
        result = plus_product(weights, direction, -lr * nesterov)
        of_blend = torch.where(nesterov, momentum, torch.ones_like(momentum))
        add_product(result, blend, -lr * of_blend)
    _store(skip, part.backups, result, part.weights)


def _blended(
    part: Part,
    direction: Sequence[Tensor],
    counters: Sequence[Tensor],
    momentum: Tensor,
    undamped: Tensor,
) -> list[Tensor]:
    """Return the new momentum buffers in the arithmetic dtype.

    At the first update of a parameter the buffer becomes the gradient, without dampening.
    """
    undamped = undamped[part.group].to(momentum.dtype)
    buffers = arithmetic(part.states[0])
    if not counters:
        blend = list(torch._foreach_mul(buffers, momentum))
        add_product(blend, direction, undamped)
        return blend
    first = torch.stack(list(counters)) == 0
    kept = torch.where(first, torch.zeros_like(momentum), momentum)
    added = torch.where(first, torch.ones_like(undamped), undamped)
    blend = list(torch._foreach_mul(buffers, list(kept.unbind())))
    torch._foreach_addcmul_(blend, list(direction), list(added.unbind()))
    return blend


def _update_adam(
    part: Part, scalars: TorchScalars, counters: Sequence[Tensor], skip: Tensor
) -> None:
    """Make the update of ``torch.optim.Adam`` and ``AdamW``."""
    weights = arithmetic(part.backups)
    dtype = weights[0].dtype

    def setting(name: str) -> Tensor:
        return scalars.setting(name)[part.group].to(dtype)

    def complement(name: str) -> Tensor:
        return scalars.complement(name)[part.group].to(dtype)

    lr, decay = setting("lr"), setting("weight_decay")
    decoupled = setting("decoupled") != 0
    none, one = torch.zeros_like(decay), torch.ones_like(decay)
    direction = list(
        torch._foreach_mul(
            arithmetic(part.gradients), scalars.gradient_factor()[part.group].to(dtype)
        )
    )
    add_product(direction, weights, torch.where(decoupled, none, decay))

    first = list(torch._foreach_sub(direction, arithmetic(part.states[0])))
    torch._foreach_mul_(first, complement("beta1"))
    torch._foreach_add_(first, arithmetic(part.states[0]))
    _store(skip, part.states[0], first, part.states[0])

    torch._foreach_mul_(direction, direction)
    second = list(torch._foreach_mul(arithmetic(part.states[1]), setting("beta2")))
    add_product(second, direction, complement("beta2"))
    _store(skip, part.states[1], second, part.states[1])
    if part.states[2]:
        second = list(torch._foreach_maximum(second, arithmetic(part.states[2])))
        _store(skip, part.states[2], second, part.states[2])

    steps = torch.stack(list(counters)).to(dtype) + 1.0
    step_sizes = lr / _bias(complement("beta1"), steps)
    roots = _bias(complement("beta2"), steps).sqrt()
    denominator = list(torch._foreach_sqrt(second))
    torch._foreach_div_(denominator, list(roots.unbind()))
    add_scalar(denominator, setting("eps"))
    torch._foreach_mul_(first, list(step_sizes.unbind()))
    torch._foreach_div_(first, denominator)
    result = list(torch._foreach_mul(weights, torch.where(decoupled, 1.0 - lr * decay, one)))
    torch._foreach_sub_(result, first)
    _store(skip, part.backups, result, part.weights)


def _bias(complement: Tensor, steps: Tensor) -> Tensor:
    """Return ``1 - beta^steps``, computed from ``1 - beta`` without cancellation."""
    return -torch.expm1(steps * torch.log1p(-complement))


def _store(
    skip: Tensor, old: Sequence[Tensor], new: Sequence[Tensor], where: Sequence[Tensor]
) -> None:
    """Write ``new``, rounded to nearest, or ``old`` if the step is skipped.

    The values are selected, because a factor of 0 would turn inf into NaN.
    """
    for before, after, target in zip(old, new, where, strict=True):
        torch.where(skip, before, after.to(target.dtype), out=target)
