"""SAM in plain PyTorch, one operation per tensor: the baseline of the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PlainSAM(Optimizer):
    """Implements Sharpness-Aware Minimization (Foret et al. 2021, algorithm 1) as it is usually written.

    It has the interface of :class:`fastsam.SAM`, without its kernels and checks. Each phase runs PyTorch
    operations tensor by tensor.

    Args:
        params: parameters or parameter groups.
        base_optimizer: optimizer class that makes the descent step.
        rho: radius of the perturbation (0.05 in the paper's section 3.1).
        adaptive: ASAM's scaling by the weights (Kwon et al. 2021).
        **kwargs: arguments of the base optimizer.

    Example:
        >>> import torch
        >>> from fastsam.optim.plain import PlainSAM
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = PlainSAM([w], torch.optim.SGD, rho=0.1, lr=0.5)
        >>> def backward():
        ...     w.square().sum().backward()
        >>> backward(); opt.first_step(zero_grad=True); backward(); opt.second_step(zero_grad=True)
        >>> bool((w < 1).all())
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self._before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights to ``w + rho g / ||g||``."""
        norm = self._gradient_norm()
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self._before[p] = p.detach().clone()
                step = p.grad * scale.to(p)
                if group["adaptive"]:
                    step = step * p.square()
                p.add_(step)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore w and make the base optimizer's update with the gradient of the perturbed weights."""
        for p, before in self._before.items():
            p.copy_(before)
        self._before.clear()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make a whole step after the first backward pass; ``closure`` makes the second."""
        if closure is None:
            raise RuntimeError("step() needs a closure that makes the second backward pass")
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()

    def _gradient_norm(self) -> Tensor:
        norms: list[Tensor] = [
            (p.grad * p.abs() if group["adaptive"] else p.grad).norm(p=2)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        total: Tensor = torch.stack(norms).norm(p=2)
        return total
