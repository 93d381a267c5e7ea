"""LPF-SGD: the gradient of the loss smoothed by a Gaussian filter over the weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.kernels.backends import widened
from fastsam.optim._engine.autocast import weights_change
from fastsam.optim._engine.noise import add_normal
from fastsam.optim.passes import Need, Passes
from fastsam.optim.variants.base import Option, Update
from fastsam.optim.variants.noisy import SEED, NoisyOptimizer, restore


class LPFSGD(NoisyOptimizer):
    """Implements LPF-SGD: the update uses the mean of gradients at randomly perturbed weights.

    Bisla et al., "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning
    Optimization Landscape" (AISTATS 2022), algorithm 1. For each of M parts of a batch, Gaussian noise
    perturbs every filter (slice along the first dimension; whole vector for biases and scales) with a
    standard deviation of ``gamma`` times the norm of the filter. The weights are restored bit for bit
    after each part, and the base optimizer uses the mean gradient. ``step`` returns the mean loss of the
    parts.

    Args:
        optimizer: the base optimizer.
        gamma: standard deviation of the noise relative to the filter norms. Default 0.002 (the authors'
            code, for ResNets on CIFAR).
        parts: number M of parts; the closure is called once per part. Default 1.
        seed: seed of the noise.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = LPFSGD(torch.optim.SGD(model.parameters(), lr=0.1), gamma=0.002)
        >>> for need in optimizer.passes():
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 3)).square().mean().backward()
    """

    declared: ClassVar = {
        "gamma": Option("lpf_gamma", source="0.002 for ResNets on CIFAR, in the authors' code"),
        "parts": Option(low=1, whole=True),
        "seed": SEED,
    }

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        gamma: float = 0.002,
        parts: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, gamma=gamma, parts=parts, seed=seed)
        self.parts = parts
        self.seed = seed

    @torch.no_grad()
    def _passes(self, update: Update) -> Passes:
        trained = self._trained()
        before = [parameter.clone() for _, parameter in trained]
        total: list[Tensor | None] = [None] * len(trained)
        for part in range(self.parts):
            try:
                with weights_change():
                    add_normal(
                        [parameter for _, parameter in trained],
                        [group["lpf_gamma"] * _filter_norms(p) for group, p in trained],
                        seed=self.seed,
                        position=self.steps_taken * self.parts + part,
                    )
                yield Need(part=(part, self.parts))
            finally:
                restore(trained, before)
            for index, (_, parameter) in enumerate(trained):
                gradient = parameter.grad
                if gradient is not None:
                    summed = total[index]
                    total[index] = gradient.clone() if summed is None else summed.add_(gradient)
        for (_, parameter), summed in zip(trained, total, strict=True):
            parameter.grad = None if summed is None else summed.div_(self.parts)
        update(self.base_optimizer.step)

    def _loss_of(self, losses: list[Tensor]) -> Tensor:
        """Return the mean loss of the parts."""
        return torch.stack([loss.detach() for loss in losses]).mean()


def _filter_norms(parameter: Tensor) -> Tensor:
    """Return the norm of every filter, ``[shape[0]]``, or of a vector, ``[1]``, as :func:`widened`."""
    filters = parameter.flatten(1) if parameter.dim() > 1 else parameter.reshape(1, -1)
    norms: Tensor = torch.linalg.vector_norm(widened(filters), dim=1)
    return norms
