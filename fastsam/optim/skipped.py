"""Undo the changes that the forward passes of a skipped step made, for example to running statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Skipping(Protocol):
    """An optimizer that counts its skipped steps on the device."""

    @property
    def skipped_steps(self) -> Tensor:
        """Number of skipped steps: integer scalar tensor."""


@contextmanager
def kept_if_skipped(optimizer: Skipping, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore ``tensors`` if the optimizer skips the step made inside the context.

    A batch with a NaN loss updates the running statistics of batch normalization before the optimizer
    sees the gradient and skips the update. The host does not wait: the device selects between the values
    before and after the step. This takes two more copies of the tensors in memory and, for each device and
    dtype, two concatenations, one selection and one copy.

    Args:
        optimizer: :class:`fastsam.SAM`, or any object with ``skipped_steps``.
        tensors: tensors to restore, such as the model's ``buffers()``.

    Example:
        >>> from fastsam import SAM
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> with kept_if_skipped(optimizer, model.buffers()):
        ...     for step in (optimizer.first_step, optimizer.second_step):
        ...         model(torch.tensor([[1.0, 2.0], [3.0, float("nan")]])).sum().backward()
        ...         step(zero_grad=True)
        >>> model[0].running_mean
        tensor([0., 0.])
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.device, tensor.dtype].append(tensor)
    with torch.no_grad():
        count = optimizer.skipped_steps.clone()
        before = {kind: _joined(members) for kind, members in alike.items()}
    yield
    with torch.no_grad():
        skipped = optimizer.skipped_steps != count
        for (device, dtype), members in alike.items():
            here = skipped.to(device, non_blocking=True)
            chosen = torch.where(here, before[device, dtype], _joined(members))
            parts = torch.split(chosen, [member.numel() for member in members])
            torch._foreach_copy_(
                members, [part.view(m.shape) for part, m in zip(parts, members, strict=True)]
            )


def _joined(tensors: list[Tensor]) -> Tensor:
    """Return the elements of all tensors as one new flat tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
