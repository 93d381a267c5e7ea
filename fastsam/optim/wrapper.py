"""What the optimizers that change a base optimizer's gradient or weights have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[[], Tensor]
"""Clears the gradients, runs forward and backward, and returns the loss."""

COUNTER = "steps_taken"


class WrappedOptimizer(Optimizer):
    """An optimizer around a ready base optimizer, with the same groups and the same state.

    Options and the number of steps taken live in the parameter groups, so a state dict of the
    wrapper holds everything and schedulers of either object work.

    Args:
        optimizer: the base optimizer; its groups get the options.
        **options: options of the wrapper, by name.
    """

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        own = {**options, COUNTER: 0}
        for group in optimizer.param_groups:
            for name, value in own.items():
                group.setdefault(name, value)
        super().__init__(optimizer.param_groups, {**optimizer.defaults, **own})
        self.base_optimizer = optimizer
        self._share()

    @abstractmethod
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One step; the closure is called for every pass that it needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of the same class returned."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    @property
    def steps_taken(self) -> int:
        """Steps completed since the first."""
        return int(self.param_groups[0][COUNTER])

    def _count(self) -> None:
        for group in self.param_groups:
            group[COUNTER] += 1

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Every parameter that is trained, with its group."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield group, parameter

    def _required(self, closure: Closure | None) -> Closure:
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that clears the gradients, runs "
                "forward and backward, and returns the loss"
            )
        return torch.enable_grad()(closure)


def check_option(name: str, value: float, *, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless ``low <= value <= high`` and the value is finite."""
    if not low <= value <= high or value == float("inf"):
        limit = "" if high == float("inf") else f" and at most {high:g}"
        raise ValueError(f"{name} must be at least {low:g}{limit}, got {value}")


def normal_like(parameter: Tensor, seed: int, step: int, part: int, index: int) -> Tensor:
    """Standard normal numbers in the shape of ``parameter``, from a position and nothing else.

    Drawn on the CPU, so that every device and any number of threads sees the same.

    Args:
        parameter: gives shape, dtype and device.
        seed: seed of the run.
        step: step of the optimizer.
        part: which draw of that step.
        index: which parameter.
    """
    mixed = seed
    for position in (step, part, index):
        # The multiplier and increment of a 64-bit linear congruential generator (Knuth, MMIX).
        mixed = ((mixed ^ position) * 6364136223846793005 + 1442695040888963407) % 2**64
    generator = torch.Generator().manual_seed(mixed >> 1)
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
