"""Perturbed gradient descent: isotropic noise that lets a run escape saddle points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.optim._engine.autocast import weights_change
from fastsam.optim._engine.noise import add_normal
from fastsam.optim.passes import Need, Passes, run_passes
from fastsam.optim.variants.base import Closure, Option, Update, refuse_unsupported
from fastsam.optim.variants.noisy import SEED, NoisyOptimizer, Trained, restore

NOISE_ON = ("gradient", "weights")


class PGD(NoisyOptimizer):
    """Implements perturbed gradient descent: Gaussian noise on every gradient, or on every weight.

    Jin et al., "How to Escape Saddle Points Efficiently" (ICML 2017), perturb the weights occasionally;
    their later work (arXiv 1902.04811, algorithm 1) perturbs the gradient at every step. This class adds
    the noise at every step: to the gradient after the backward pass, or to the weights before it. Noise on
    the weights is permanent; it is removed only if the pass raises an error.

    Args:
        optimizer: the base optimizer.
        sigma: standard deviation of the noise; no published default.
        noise_on: ``"gradient"`` (default) or ``"weights"``, which keeps a copy of the weights during the
            pass.
        seed: seed of the noise.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = PGD(torch.optim.SGD(model.parameters(), lr=0.1), sigma=1e-4)
        >>> for need in optimizer.passes():
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 3)).square().mean().backward()
    """

    declared: ClassVar = {
        "sigma": Option("sigma"),
        "noise_on": Option(choices=NOISE_ON),
        "seed": SEED,
    }

    def __init__(
        self, optimizer: Optimizer, *, sigma: float, noise_on: str = "gradient", seed: int = 0
    ) -> None:
        super().__init__(optimizer, sigma=sigma, noise_on=noise_on, seed=seed)
        self.noise_on = noise_on
        self.seed = seed

    @torch.no_grad()
    def _passes(self, update: Update) -> Passes:
        trained = self._trained()
        if self.noise_on == "gradient":
            yield Need()
            refuse_unsupported(parameter for _, parameter in trained)
            self._add_noise(trained, [parameter.grad for _, parameter in trained])
        else:
            before = [parameter.clone() for _, parameter in trained]
            try:
                with weights_change():
                    self._add_noise(trained, [parameter for _, parameter in trained])
                yield Need()
            except BaseException:  # including GeneratorExit, when the caller abandons the step
                restore(trained, before)
                raise
        update(self.base_optimizer.step)

    def _answer(self, passes: Passes, closure: Closure) -> list[Tensor]:
        """Run one step. With noise on the gradient, earlier micro-batches may have accumulated gradients."""
        if self.noise_on == "gradient":
            return run_passes(passes, lambda _: torch.enable_grad()(closure)())
        return super()._answer(passes, closure)

    def _loss_of(self, losses: list[Tensor]) -> Tensor:
        """Return the closure's result, as torch.optim does."""
        return losses[0]

    def _add_noise(self, trained: Trained, tensors: Sequence[Tensor | None]) -> None:
        deviations = self._by_group(trained, lambda group: group["sigma"])
        present = [
            (tensor, deviation)
            for tensor, deviation in zip(tensors, deviations, strict=True)
            if tensor is not None
        ]
        add_normal(
            [tensor for tensor, _ in present],
            [deviation for _, deviation in present],
            seed=self.seed,
            position=self.steps_taken,
        )
