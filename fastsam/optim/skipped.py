"""Undo the changes that the forward passes of a skipped step made, for example to running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
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
    sees the gradient and skips the update. On a GPU the host does not wait: the device selects between the
    values before and after the step. This takes two more copies of the tensors in memory and, for each device
    and dtype, three copies and one selection.

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
    with KeptTensors(tensors).if_skipped(optimizer):
        yield


class KeptTensors:
    """Tensors that are restored after skipped steps, with memory for their values.

    It serves any number of steps; see :func:`kept_if_skipped` for one.

    Args:
        tensors: tensors to restore. They must keep their memory: only their values may change.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)

    @cached_property
    def _groups(self) -> list[_Group]:
        """Allocate the memory in the first :meth:`if_skipped`, which a run may never enter."""
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in self._tensors:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        return [_Group(members) for members in alike.values()]

    @contextmanager
    def if_skipped(self, optimizer: Skipping) -> Iterator[None]:
        """Restore the tensors if the optimizer skips the step made inside the context."""
        count = optimizer.skipped_steps.clone()
        for group in self._groups:
            group.keep()
        yield
        skipped = optimizer.skipped_steps != count
        if skipped.device.type == "cpu" and not skipped:
            return
        for group in self._groups:
            group.restore_if(skipped)


class _Group:
    """Tensors of one device and dtype, and two flat copies of their values."""

    def __init__(self, members: list[Tensor]) -> None:
        self._members = [_memory_of(member) for member in members]
        sizes = [member.numel() for member in self._members]
        self._before = torch.empty(sum(sizes), dtype=members[0].dtype, device=members[0].device)
        self._after = torch.empty_like(self._before)
        self._after_parts = torch.split(self._after, sizes)

    def keep(self) -> None:
        torch.cat(self._members, out=self._before)

    def restore_if(self, flag: Tensor) -> None:
        torch.cat(self._members, out=self._after)
        here = flag.to(self._before.device, non_blocking=True)
        torch.where(here, self._before, self._after, out=self._after)
        torch._foreach_copy_(self._members, self._after_parts)


def _memory_of(tensor: Tensor) -> Tensor:
    """Return the range of memory that a tensor of any strides covers, as a vector without gradient."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.detach().as_strided((last + 1 if tensor.numel() else 0,), (1,))
