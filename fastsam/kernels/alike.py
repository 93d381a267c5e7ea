"""Comparison of the metadata of many tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_Guards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _Guards
except ImportError:  # a build or version of torch without it
    _Guards = None


class Alike:
    """Checks whether tensors have the types, layouts, dtypes, devices, shapes and strides of given ones.

    Reading these properties in Python, tensor by tensor, takes a tenth of the time of an update for the 95
    gradients of a ResNet-32. The guards of torch's compiler compare all of them in one C++ call, which this
    class uses. The call is private to torch: if it is missing or changed, :meth:`fits` returns False, and
    callers compare tensor by tensor.

    Args:
        tensors: tensors to compare others with; they are not kept alive.

    Example:
        >>> import torch
        >>> alike = Alike([torch.zeros(2, 3)])
        >>> alike.fits([torch.zeros(3, 2)])
        False
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._guards: Any = None
        examples = [tensor.detach() for tensor in tensors]  # of type Tensor, without a gradient
        try:
            guards = _Guards(
                *examples,
                dynamic_dims_sizes=[list(example.shape) for example in examples],
                dynamic_dims_strides=[list(example.stride()) for example in examples],
            )
            if guards.check(*examples):
                self._guards = guards
        except (TypeError, SystemError, RuntimeError):
            pass

    def fits(self, tensors: Sequence[Tensor | None]) -> bool:
        """Return True only if the number of tensors is equal and each matches its counterpart.

        False does not imply a difference: the call also fails for tensor subclasses, and under autocast or
        inference mode.
        """
        if self._guards is None or len(tensors) != self._count:
            return False
        return bool(self._guards.check(*tensors))
