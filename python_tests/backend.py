"""What a test may expect of the backend that runs: bits of native kernels, rounding of PyTorch operations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.kernels.backends import backend_of


def is_native(device: torch.device | str = "cpu") -> bool:
    """Whether native kernels run on ``device``."""
    return backend_of(torch.device(device)) == "native"


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal bits with native kernels, equality to rounding with PyTorch operations.

    For what one of fastsam's steps computed and something else did, too: torch's own optimizer, or the
    reference. What is copied or computed twice in the same way has the same bits in either case.
    """
    if is_native(actual.device):
        assert torch.equal(actual, expected)
        return
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=64 * eps, atol=8 * eps, equal_nan=True)


def assert_all_same(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """:func:`assert_same` for every pair."""
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
