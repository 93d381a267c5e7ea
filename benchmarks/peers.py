"""SAM as others would write it: what the fused step is measured against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsam.optim import SAM
from fastsam.optim.plain import PlainSAM

Step = Callable[[], object]
"""The optimizer part of one step, both halves, on gradients that are already there."""

SETTINGS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 2e-4}
RHO = 0.05


class ForeachSAM:
    """A careful SAM on PyTorch's multi-tensor operations and its fused SGD."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.base = torch.optim.SGD(self.parameters, fused=True, **SETTINGS)
        self.backup = [torch.empty_like(p) for p in self.parameters]

    @torch.no_grad()
    def first_step(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_copy_(self.backup, self.parameters)
        scaled = torch._foreach_mul(gradients, RHO / (norm + 1e-12))
        torch._foreach_add_(self.parameters, scaled)

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.parameters, self.backup)
        self.base.step()


def both_halves(optimizer: Any) -> Step:
    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def fused(parameters: Sequence[Tensor], *, check_finite: bool = True) -> Step:
    return both_halves(
        SAM(parameters, torch.optim.SGD, rho=RHO, check_finite=check_finite, **SETTINGS)
    )


def fused_unchecked(parameters: Sequence[Tensor]) -> Step:
    return fused(parameters, check_finite=False)


def plain(parameters: Sequence[Tensor]) -> Step:
    return both_halves(PlainSAM(parameters, torch.optim.SGD, rho=RHO, **SETTINGS))


def foreach(parameters: Sequence[Tensor]) -> Step:
    return both_halves(ForeachSAM(parameters))


def compiled_foreach(parameters: Sequence[Tensor]) -> Step:
    optimizer = ForeachSAM(parameters)
    first = torch.compile(optimizer.first_step)
    second = torch.compile(optimizer.second_step)

    def step() -> None:
        first()
        second()

    return step


def reference_file(path: Path) -> Callable[[Sequence[Tensor]], Step]:
    """The class ``SAM`` of a file with the reference implementation's interface."""
    spec = importlib.util.spec_from_file_location("reference_sam", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(parameters: Sequence[Tensor]) -> Step:
        return both_halves(module.SAM(parameters, torch.optim.SGD, rho=RHO, **SETTINGS))

    return make


def pytorch_optimizer(parameters: Sequence[Tensor]) -> Step:
    """``pytorch_optimizer.SAM`` from the package index."""
    import pytorch_optimizer as package

    return both_halves(package.SAM(parameters, torch.optim.SGD, rho=RHO, **SETTINGS))


def floor(parameters: Sequence[Tensor]) -> Step:
    """Torch's fused SGD alone: no SAM step can be cheaper."""
    return torch.optim.SGD(parameters, fused=True, **SETTINGS).step


BYTES_PER_PARAMETER = {
    "fastsam": 44,  # norm 4, perturb 16, check 4, restore and update 20
    "fastsam, no check": 40,
    "plain PyTorch": 84,  # norm 4, clone 8, scale 8, add 12, restore 8, SGD with decay and momentum 44
    "foreach + fused SGD": 60,  # norm 4, copy 8, scale 8, add 12, copy 8, fused SGD 20
    "fused SGD alone": 20,
}
"""float32 bytes that must move per parameter with momentum and weight decay, counted from the operations."""
