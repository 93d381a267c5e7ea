"""Entropy-SGD: descent on the local entropy of the loss, estimated by Langevin dynamics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.optim._engine.autocast import weights_change
from fastsam.optim._engine.noise import add_normal
from fastsam.optim.passes import Need, Passes
from fastsam.optim.variants.base import Option, Update, refuse_unsupported
from fastsam.optim.variants.noisy import SEED, NoisyOptimizer, Trained, restore

_PAPER = "section 4.2 of Chaudhari et al. 2017"


class EntropySGD(NoisyOptimizer):
    """Implements Entropy-SGD: explore by Langevin steps and move toward the mean of the visited weights.

    Chaudhari et al., "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys" (ICLR 2017),
    algorithm 1: from x' = mu = x, repeat ``steps`` times ``x' -= inner_lr (g(x') + gamma (x' - x))
    + sqrt(inner_lr) noise N(0, 1)`` and ``mu = alpha mu + (1 - alpha) x'``. Then the base optimizer
    uses ``x - mu`` as the gradient at x. The paper multiplies this gradient by gamma; here that factor is
    part of the learning rate. ``step`` returns the loss of the first pass, at x. A parameter that has no
    gradient in any pass is not updated.

    Args:
        optimizer: the base optimizer. With a learning rate of 1 and no momentum, x moves to mu.
        steps: number L of Langevin steps. Each calls the closure, which should use a new batch every time.
            Default 5.
        inner_lr: step size of the Langevin dynamics. Default 0.1 (section 4.2 of the paper).
        gamma: scope: strength of the pull of x' toward x. Default 0.03.
        noise: thermal noise. Default 1e-4 (section 4.2 of the paper).
        alpha: decay of the running mean. Default 0.75 (section 4.2 of the paper).
        seed: seed of the noise.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = EntropySGD(torch.optim.SGD(model.parameters(), lr=1.0), steps=5)
        >>> for need in optimizer.passes():
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 3)).square().mean().backward()
    """

    declared: ClassVar = {
        "steps": Option(low=1, whole=True),
        "inner_lr": Option("entropy_lr", source=f"0.1, {_PAPER}"),
        "gamma": Option("entropy_gamma"),
        "noise": Option("entropy_noise", source=f"1e-4, {_PAPER}"),
        "alpha": Option("entropy_alpha", high=1.0, source=f"0.75, {_PAPER}"),
        "seed": SEED,
    }

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        steps: int = 5,
        inner_lr: float = 0.1,
        gamma: float = 0.03,
        noise: float = 1e-4,
        alpha: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__(
            optimizer,
            steps=steps,
            inner_lr=inner_lr,
            gamma=gamma,
            noise=noise,
            alpha=alpha,
            seed=seed,
        )
        self.inner_steps = steps
        self.seed = seed

    @torch.no_grad()
    def _passes(self, update: Update) -> Passes:
        trained = self._trained()
        center = [parameter.clone() for _, parameter in trained]
        means = [parameter.clone() for _, parameter in trained]
        moved = [False] * len(trained)
        try:
            for inner in range(self.inner_steps):
                yield Need(fresh=True)
                refuse_unsupported(parameter for _, parameter in trained)
                for index, (_, parameter) in enumerate(trained):
                    moved[index] |= parameter.grad is not None
                with weights_change():
                    self._langevin_step(trained, center, inner)
                for (group, parameter), mean in zip(trained, means, strict=True):
                    mean.lerp_(parameter, 1 - group["entropy_alpha"])
        finally:
            restore(trained, center)
        for (_, parameter), old, mean, has_moved in zip(trained, center, means, moved, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(old - mean)
            elif has_moved:  # a layer that the last pass left out
                parameter.grad = old - mean
        update(self.base_optimizer.step)

    def _langevin_step(self, trained: Trained, center: Sequence[Tensor], inner: int) -> None:
        for (group, parameter), old in zip(trained, center, strict=True):
            pull = (parameter - old).mul_(group["entropy_gamma"])
            if parameter.grad is not None:
                pull.add_(parameter.grad)
            parameter.sub_(pull, alpha=group["entropy_lr"])
        add_normal(
            [parameter for _, parameter in trained],
            self._by_group(
                trained, lambda group: math.sqrt(group["entropy_lr"]) * group["entropy_noise"]
            ),
            seed=self.seed,
            position=self.steps_taken * self.inner_steps + inner,
        )
