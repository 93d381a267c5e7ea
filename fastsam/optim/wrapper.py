"""What the optimizers that change a base optimizer's gradient or weights have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.kernels.noise import add_noise
from fastsam.kernels.sam import TensorTable
from fastsam.optim.closures import WHAT_A_CLOSURE_DOES, ClosurePasses
from fastsam.optim.outer import OuterOptimizer
from fastsam.optim.passes import Passes
from fastsam.optim.settings import (
    Default,
    check_base_group,
    check_given,
    check_number,
    refuse_clashes,
    value_of,
)
from fastsam.optim.untraced import untraced
from fastsam.upload import upload

Closure = Callable[[], Tensor]
"""Clears the gradients, runs forward and backward, and returns the loss."""

Update = Callable[[Callable[[], Any]], None]
"""Makes the step it is given and counts it."""

COUNTER = "steps_taken"


class WrappedOptimizer(OuterOptimizer, ABC):
    """An optimizer around a ready base optimizer, with the same groups and the same state.

    Options and the number of steps taken live in the parameter groups, so a state dict of the
    wrapper holds everything and schedulers of either object work.

    Args:
        optimizer: the base optimizer; its groups get the options.
        **options: options of the wrapper, by name; a :class:`Default` yields to what a group has.

    Raises:
        ValueError: the base optimizer has an option of its own by one of these names, or a group of it
            another value for one, from an earlier wrapper for instance. Nothing was changed.
    """

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        own = {name: value_of(option) for name, option in options.items()}
        refuse_clashes(type(self).__name__, own, optimizer)
        check_given(options, optimizer.param_groups)
        for group in optimizer.param_groups:
            check_base_group(group)
        super().__init__(optimizer, {**own, COUNTER: 0})
        self._closure_passes = ClosurePasses(type(self).__name__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._closure_passes = ClosurePasses(type(self).__name__)

    @untraced
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Make one step and return its loss, that of the first pass unless the class says otherwise.

        Args:
            closure: clears the gradients, runs forward and backward, and returns the loss. It is called
                for every pass, with gradients enabled.

        Raises:
            TypeError: there is no closure, or it returned something else.
            RuntimeError: the closure kept gradients that it found. Whatever it raises, the weights are as
                they were.
        """
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that {WHAT_A_CLOSURE_DOES}"
            )
        return self._loss_of(self._answer(self._passes(self._update), closure))

    def passes(self) -> Passes:
        """Return one step as a generator of the gradients it needs.

        Hooks of ``step`` fire around the base optimizer's update. See :func:`fastsam.optim.passes_of`.
        """
        return self._passes(self._hooked_update)

    @abstractmethod
    def _passes(self, update: Update) -> Passes:
        """Return the algorithm, which hands the base optimizer's step to ``update`` once."""

    def _answer(self, passes: Passes, closure: Closure) -> list[Tensor]:
        """Answer the passes of one step with a closure and return their losses."""
        return self._closure_passes.run(passes, closure, [p for _, p in self._parameters()])

    def _loss_of(self, losses: list[Tensor]) -> Tensor:
        """Return the loss of a step from those of its passes."""
        return losses[0].detach()

    def _update(self, step: Callable[[], Any]) -> None:
        step()
        self._opt_called = True  # a scheduler on this object asks whether it was stepped
        for group in self.param_groups:
            group[COUNTER] += 1

    _hooked_update = Optimizer.profile_hook_step(_update)

    @property
    def steps_taken(self) -> int:
        """Steps completed since the first."""
        return int(self.param_groups[0][COUNTER])

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Every parameter that is trained, with its group."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield group, parameter

    def _by_group(self, deviation: Callable[[dict[str, Any]], float]) -> list[Tensor]:
        """One standard deviation for all parameters of a group, float64 ``[1]`` for each parameter."""
        return [
            value
            for group in self.param_groups
            for value in [torch.tensor([deviation(group)], dtype=torch.float64)]
            for parameter in group["params"]
            if parameter.requires_grad
        ]


def check_option(
    name: str,
    option: float | Default[float],
    *,
    low: float = 0.0,
    high: float = math.inf,
    whole: bool = False,
) -> None:
    """Raise ValueError unless the option's value is a finite number with ``low <= value <= high``."""
    check_number(name, value_of(option), low=low, high=high, whole=whole)


def add_normal(
    tensors: Sequence[Tensor], deviations: Sequence[Tensor], *, seed: int, position: int
) -> None:
    """Add normal noise to tensors in place, one native launch for each device and dtype.

    The noise depends on seed, position, place in ``tensors`` and place in memory alone: the same
    bits on any number of threads, and to rounding the same on every device.

    Args:
        tensors: dense, of any shape; changed in place.
        deviations: standard deviations, float64 ``[rows]`` for each tensor: one for all of it, or
            one for each slice along the first dimension. The same object may serve many tensors: it
            is moved to their device once.
        seed: seed of the run, below 2^63.
        position: which draw of the run.
    """
    members: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            members[tensor.device, tensor.dtype].append(index)
    for (device, _), chosen in members.items():
        count = len(chosen)
        distinct = {id(deviations[index]): deviations[index] for index in chosen}
        moved = {key: upload(deviation.double(), device) for key, deviation in distinct.items()}
        table = TensorTable(
            [tensors[index] for index in chosen], groups=[0] * count, adaptive=[False] * count
        )
        add_noise(
            table,
            [moved[id(deviations[index])] for index in chosen],
            upload(torch.tensor([seed, position]), device),
            streams=chosen,
        )
