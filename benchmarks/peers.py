"""Other implementations of SAM, with which the fused step is compared."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.optim import SAM
from fastsam.optim.plain import PlainSAM
from fastsam.optim.rehearsal import rehearsal

Step = Callable[[], object]
"""The optimizer part of one step, both halves, on existing gradients."""

RHO = 0.05
FLOOR = "fused base alone"


@dataclass(frozen=True)
class Base:
    """A base optimizer and its settings.

    Attributes:
        make: the optimizer class.
        settings: arguments of the class.
        state: number of state tensors per weight tensor.
    """

    make: type[torch.optim.SGD] | type[torch.optim.Adam] | type[torch.optim.AdamW]
    settings: dict[str, Any]
    state: int

    @property
    def update_bytes(self) -> int:
        """Bytes per float32 parameter of one fused update: reads w, g and state, writes w and state."""
        return 4 * (3 + 2 * self.state)

    def fused(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Create torch's fused implementation."""
        return self.make(parameters, fused=True, **self.settings)


BASES = {
    "SGD": Base(torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 2e-4}, 1),
    "Adam": Base(torch.optim.Adam, {"lr": 1e-3, "weight_decay": 2e-4}, 2),
    "AdamW": Base(torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}, 2),
}

Peer = Callable[[Sequence[Tensor], Base], Step]


class ForeachSAM:
    """SAM with PyTorch's multi-tensor operations and its fused base optimizer."""

    def __init__(self, parameters: Sequence[Tensor], base: Base) -> None:
        self.parameters = list(parameters)
        self.base = base.fused(self.parameters)
        self.backup = [torch.empty_like(p) for p in self.parameters]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return norm

    @torch.no_grad()
    def first_step(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.norm(gradients)
        torch._foreach_copy_(self.backup, self.parameters)
        scaled = torch._foreach_mul(gradients, RHO / (norm + 1e-12))
        torch._foreach_add_(self.parameters, scaled)

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.parameters, self.backup)
        self.base.step()


class CarefulForeachSAM(ForeachSAM):
    """The fastest plain-PyTorch SAM that we know: no allocations, and scale and add in one pass.

    The host reads the norm, which is free on the CPU but synchronizes with a GPU.
    """

    @torch.no_grad()
    def first_step(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        scale = RHO / (self.norm(gradients).item() + 1e-12)
        torch._foreach_copy_(self.backup, self.parameters)
        torch._foreach_add_(self.parameters, gradients, alpha=scale)


def both_halves(optimizer: Any) -> Step:
    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def fused(parameters: Sequence[Tensor], base: Base, *, check_finite: bool = True) -> Step:
    return both_halves(
        SAM(parameters, base.make, rho=RHO, check_finite=check_finite, **base.settings)
    )


def fused_unchecked(parameters: Sequence[Tensor], base: Base) -> Step:
    return fused(parameters, base, check_finite=False)


def captured(parameters: Sequence[Tensor], base: Base) -> Step:
    """Create a step of fastsam as one CUDA graph, whose settings are refreshed before each replay."""
    optimizer = SAM(parameters, base.make, rho=RHO, **base.settings)
    eager = both_halves(optimizer)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with rehearsal(nn.ParameterList(parameters), optimizer):
        optimizer.prepare()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                eager()
        torch.cuda.current_stream().wait_stream(side)
    optimizer.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        eager()

    def step() -> None:
        optimizer.prepare()
        graph.replay()

    return step


def without_ascent(parameters: Sequence[Tensor], base: Base, *, check_finite: bool = True) -> Step:
    """Create a step of fastsam without an ascent."""
    settings = {"start": sys.maxsize, "check_finite": check_finite, **base.settings}
    return SAM(parameters, base.make, rho=RHO, **settings).step


def without_ascent_unchecked(parameters: Sequence[Tensor], base: Base) -> Step:
    return without_ascent(parameters, base, check_finite=False)


def plain(parameters: Sequence[Tensor], base: Base) -> Step:
    return both_halves(PlainSAM(parameters, base.make, rho=RHO, **base.settings))


def foreach(parameters: Sequence[Tensor], base: Base) -> Step:
    return both_halves(ForeachSAM(parameters, base))


def careful(parameters: Sequence[Tensor], base: Base) -> Step:
    return both_halves(CarefulForeachSAM(parameters, base))


def compiled_foreach(parameters: Sequence[Tensor], base: Base) -> Step:
    optimizer = ForeachSAM(parameters, base)
    first = torch.compile(optimizer.first_step)
    second = torch.compile(optimizer.second_step)

    def step() -> None:
        first()
        second()

    return step


def reference_file(path: Path) -> Peer:
    """Load the class ``SAM`` from a file with the interface of the reference implementation."""
    spec = importlib.util.spec_from_file_location("reference_sam", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(parameters: Sequence[Tensor], base: Base) -> Step:
        return both_halves(module.SAM(parameters, base.make, rho=RHO, **base.settings))

    return make


def pytorch_optimizer(parameters: Sequence[Tensor], base: Base) -> Step:
    """Create a step of ``pytorch_optimizer.SAM``."""
    import pytorch_optimizer as package

    return both_halves(package.SAM(parameters, base.make, rho=RHO, **base.settings))


def floor(parameters: Sequence[Tensor], base: Base) -> Step:
    """Create a step of torch's fused base optimizer alone, a lower bound for every SAM step."""
    return base.fused(parameters).step


OUTSIDE_UPDATE = {
    "fastsam": 24,  # norm 4, perturb 16, check 4
    "fastsam, captured": 24,
    "fastsam, no check": 20,
    "careful foreach": 32,  # norm 4, copy 8, add 12, copy back 8
    "foreach": 40,  # norm 4, copy 8, scale 8, add 12, copy back 8
    FLOOR: 0,
}
"""Bytes per float32 parameter that are read and written outside the fused update."""


def bytes_per_parameter(peer: str, base: Base, dtype: torch.dtype = torch.float32) -> int | None:
    """Return the bytes that a step of ``peer`` reads and writes per parameter; None if not counted.

    A store to memory that is not in the cache moves 4 more bytes unless it is a streaming store, because the
    cache reads the line first. These bytes are not included.
    """
    outside = OUTSIDE_UPDATE.get(peer)
    if outside is None:
        return None
    # Weights, gradients and state all have the dtype of the parameters.
    return (outside + base.update_bytes) * dtype.itemsize // 4
