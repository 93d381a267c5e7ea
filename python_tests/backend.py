"""Expectations of tests by backend: equal bits for native kernels, rounding errors for PyTorch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsam.kernels.backends import backend_of


def is_native(device: torch.device | str = "cpu") -> bool:
    """Return whether native kernels run on ``device``."""
    return backend_of(torch.device(device)) == "native"


class Refusing(TorchDispatchMode):
    """Raises for float64 results and host reads, like devices without float64 and CUDA graphs."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        assert not name.startswith(("aten._local_scalar_dense", "aten.item", "aten.is_nonzero")), (
            f"{name} reads the device"
        )
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            assert not isinstance(result, Tensor) or result.dtype != torch.float64, (
                f"{name} gives float64"
            )
        return results
