"""Compare many tensors with what they should be, in one call."""

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
    """Whether tensors have the types, layouts, dtypes, devices, shapes and strides of given ones.

    In Python each of these properties is read tensor by tensor, which for the 95 gradients of a ResNet-32
    takes a tenth of the time of an update. torch compares all of them in one C++ call, for the guards of
    its compiler, and this class uses that. The call is not part of torch's public interface: where it is
    missing or changed, nothing is alike, and callers look at each tensor themselves.

    Args:
        tensors: what others are compared with; they are not kept.

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
        """Return True only if there are as many tensors and each is like its counterpart.

        False does not mean that one differs: the call knows no subclasses, and not the modes of autocast and
        inference.
        """
        if self._guards is None or len(tensors) != self._count:
            return False
        return bool(self._guards.check(*tensors))
