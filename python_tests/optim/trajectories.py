"""Random problems, and the trajectories of several SAM implementations on them.

A gradient is a smooth function of the weights that changes with the step and the pass. It is written to
``p.grad`` directly, because these tests do not concern autograd, and so that every pattern of missing or
broken gradients is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsam import SAM
from fastsam.optim.plain import PlainSAM
from python_tests.backend import is_native

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Tolerance relative to the largest weight, after about ten steps rounded to the storage type."""

Gradients = Callable[[int, int, int], Any]
"""``(parameter, step, pass)`` to None for no gradient, True for the smooth one, or a float to plant in it."""


def everywhere(parameter: int, step: int, which: int) -> bool:
    return True


@dataclass
class Problem:
    """Initial weights and a gradient field over them.

    Attributes:
        shapes: one per parameter.
        groups: number of parameters and SAM settings (rho, adaptive, ...) of each group.
    """

    shapes: list[tuple[int, ...]]
    groups: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        self.groups = self.groups or [(len(self.shapes), {})]
        generator = torch.Generator().manual_seed(self.seed)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.start = [draw(shape).to(self.dtype) for shape in self.shapes]
        self.curvature = [draw(shape).square() + 0.1 for shape in self.shapes]
        self.target = [draw(shape) for shape in self.shapes]

    def parameters(self, dtype: torch.dtype | None = None) -> list[nn.Parameter]:
        return [nn.Parameter(w.to(dtype or self.dtype, copy=True)) for w in self.start]

    def param_groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        rest = iter(parameters)
        return [
            {"params": [next(rest) for _ in range(count)], **settings}
            for count, settings in self.groups
        ]

    def gradient(self, i: int, weight: Tensor, step: int, which: int) -> Tensor:
        """Return the gradient, rounded to the problem's dtype for any dtype of ``weight``."""
        w = weight.detach().double()
        phase = 1.0 + 0.3 * step + 0.1 * which
        g = self.curvature[i] * (w - self.target[i]) + 0.5 * torch.sin(phase * w + i)
        return g.to(self.dtype).to(weight.dtype)

    def set_gradients(
        self,
        parameters: list[nn.Parameter],
        step: int,
        which: int,
        gradients: Gradients = everywhere,
    ) -> None:
        for i, p in enumerate(parameters):
            value = gradients(i, step, which)
            if value is None:
                p.grad = None
                continue
            p.grad = self.gradient(i, p, step, which)
            if value is not True and p.numel():
                p.grad.view(-1)[p.numel() // 2] = value

    def run(
        self,
        optimizer: Any,
        parameters: list[nn.Parameter],
        steps: int | range,
        gradients: Gradients = everywhere,
    ) -> list[Tensor]:
        for step in range(steps) if isinstance(steps, int) else steps:
            self.set_gradients(parameters, step, 0, gradients)
            optimizer.first_step(zero_grad=True)
            self.set_gradients(parameters, step, 1, gradients)
            optimizer.second_step(zero_grad=True)
        return [p.detach().clone() for p in parameters]


class OracleSAM:
    """Algorithm 1 of Foret et al. in float64, rounded to the storage type only between its phases.

    The base optimizer is torch's, one tensor at a time, on float64 copies of weights and state.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        base: type[torch.optim.Optimizer],
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.groups = [
            {"rho": rho, "adaptive": adaptive, "eta": eta, "perturb": True, **group}
            for group in param_groups
        ]
        self.parameters = [p for group in self.groups for p in group["params"]]
        self.doubles = [nn.Parameter(p.detach().double()) for p in self.parameters]
        rest = iter(self.doubles)
        own = ("rho", "adaptive", "eta", "perturb", "params")
        self.base = base(
            [
                {
                    "params": [next(rest) for _ in group["params"]],
                    **{key: value for key, value in group.items() if key not in own},
                }
                for group in self.groups
            ],
            **kwargs,
        )

    def _settings(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        return ((p, group) for group in self.groups for p in group["params"])

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        self.before = [p.detach().clone() for p in self.parameters]
        scaling = [
            p.double().abs() + group["eta"] if group["adaptive"] else torch.ones_like(p.double())
            for p, group in self._settings()
        ]
        norm = sum(
            float((t * p.grad.double()).square().sum())
            for (p, group), t in zip(self._settings(), scaling, strict=True)
            if p.grad is not None and group["perturb"]
        )
        for (p, group), t in zip(self._settings(), scaling, strict=True):
            if p.grad is not None and group["perturb"]:
                factor = group["rho"] / (norm**0.5 + 1e-12)
                p.copy_((p.double() + t.square() * p.grad.double() * factor).to(p.dtype))
        self._zero(zero_grad)

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p, double, before in zip(self.parameters, self.doubles, self.before, strict=True):
            double.copy_(before)
            double.grad = None if p.grad is None else p.grad.double()
        self.base.step()
        for p, double in zip(self.parameters, self.doubles, strict=True):
            p.copy_(double)
            double.copy_(p)
            for key, value in self.base.state[double].items():
                if isinstance(value, Tensor) and key != "step":
                    value.copy_(value.to(p.dtype))
        self._zero(zero_grad)

    def _zero(self, wanted: bool) -> None:
        if wanted:
            for p in self.parameters:
                p.grad = None


def make(
    kind: Callable[..., Any], problem: Problem, base: type[torch.optim.Optimizer], **kwargs: Any
) -> tuple[Any, list[nn.Parameter]]:
    """Return an optimizer of ``kind`` over new parameters; PyTorch's base without its fused paths."""
    parameters = problem.parameters()
    if kind is not SAM and issubclass(base, (torch.optim.SGD, torch.optim.Adam)):
        kwargs = {"foreach": False, "fused": False, **kwargs}
    if kind is PlainSAM:
        kwargs = {key: value for key, value in kwargs.items() if key != "eta"}
    return kind(problem.param_groups(parameters), base, **kwargs), parameters


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Assert that the largest difference is at most ``tolerance`` times the largest weight."""
    scale = max([float(e.double().abs().max()) for e in expected if e.numel()], default=1.0)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.dtype == e.dtype
        assert f.shape == e.shape
        assert bool(torch.isfinite(f).all()), f"parameter {i} is not finite"
        if f.numel():
            worst = float((f.double() - e.double()).abs().max())
            assert worst <= tolerance * scale, f"parameter {i}: {worst} > {tolerance} * {scale}"


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.dtype == e.dtype
        same = torch.equal(_bytes(f), _bytes(e))
        assert same, f"parameter {i} differs by {float((f.double() - e.double()).abs().max())}"


def assert_torch_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    """Assert the bits of torch's optimizer with native kernels, or its trajectory with PyTorch operations."""
    if is_native():
        assert_same_bits(found, expected)
    else:
        assert_close(found, expected, TOLERANCE[expected[0].dtype])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
