"""Settings of the optimizer tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import pytest
import torch

from fastsam.kernels.table import TensorTable
from fastsam.kernels.torch_ops import sam, updates
from fastsam.kernels.torch_ops.scalars import TorchScalars
from python_tests.backend import Refusing, is_native


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Run every test on one CPU thread."""


@pytest.fixture(autouse=True)
def _no_float64_and_no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise for float64 results and host reads in all PyTorch launches without float64 parameters."""
    if not is_native():
        for name in ("norm", "perturb", "check", "restore"):
            monkeypatch.setattr(sam, name, refusing(getattr(sam, name)))
        monkeypatch.setattr(updates, "update", refusing(updates.update))


def refusing(launch: Callable[..., None]) -> Callable[..., None]:
    """Return ``launch`` under a mode that raises for float64 results and host reads."""

    @wraps(launch)
    def refused(table: TensorTable, *arguments: Any, **options: Any) -> None:
        scalars = (a.hyper if isinstance(a, TorchScalars) else a for a in arguments)
        allowed = torch.float64 in (table.dtype, *(scalar.dtype for scalar in scalars))
        with nullcontext() if allowed else Refusing():
            launch(table, *arguments, **options)

    return refused
