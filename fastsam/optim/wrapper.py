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
from fastsam.optim.outer import OuterOptimizer
from fastsam.optim.passes import ClosurePasses
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
        self._passes = ClosurePasses(type(self).__name__)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls):
            cls.step = untraced(cls.step)  # type: ignore[method-assign]

    @abstractmethod
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One step; the closure is called for every pass that it needs."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._passes = ClosurePasses(type(self).__name__)

    @property
    def steps_taken(self) -> int:
        """Steps completed since the first."""
        return int(self.param_groups[0][COUNTER])

    def _count(self) -> None:
        for group in self.param_groups:
            group[COUNTER] += 1
        self._passes.finish(p for _, p in self._parameters())

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

    def _required(self, closure: Closure | None) -> Closure:
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that {_WHAT_A_CLOSURE_DOES}"
            )
        return torch.enable_grad()(closure)

    def _required_passes(self, closure: Closure | None) -> Closure:
        """The closure for all passes of one step, each of which begins without a gradient."""
        required = self._required(closure)
        parameters = [p for _, p in self._parameters()]
        run = self._passes.first

        def one_pass() -> Tensor:
            nonlocal run
            loss = run(required, parameters)
            run = self._passes.again
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"the closure of {type(self).__name__}.step returned {loss!r}; expected a closure that "
                    f"{_WHAT_A_CLOSURE_DOES}"
                )
            return loss

        return one_pass


_WHAT_A_CLOSURE_DOES = "clears the gradients, runs forward and backward, and returns the loss"


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
