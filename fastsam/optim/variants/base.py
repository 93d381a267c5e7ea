"""The base class of optimizers that change a base optimizer's gradient or weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.optim._engine.closures import WHAT_A_CLOSURE_DOES, ClosurePasses
from fastsam.optim._engine.outer import OuterOptimizer
from fastsam.optim._engine.settings import (
    check_base_group,
    check_choice,
    check_number,
    refuse_clashes,
)
from fastsam.optim._engine.untraced import untraced
from fastsam.optim.passes import Passes

Closure = Callable[[], Tensor]
"""Clears the gradients, runs forward and backward, and returns the loss."""

Update = Callable[[Callable[[], Any]], None]
"""Makes the step it is given and counts it."""

COUNTER = "steps_taken"


@dataclass(frozen=True)
class Option:
    """Declare an option of a variant; its default stands in the constructor's signature.

    Args:
        key: name in the parameter groups. None for an option that is no setting of a group.
        low: smallest value of a number.
        high: largest value of a number.
        whole: whether the number must be an integer.
        choices: the values to choose from, where it is no number.
        source: a published value and where it comes from.
    """

    key: str | None = None
    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    choices: tuple[str, ...] = ()
    source: str | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError unless ``value`` is one for this option."""
        try:
            if self.choices:
                check_choice(name, value, self.choices)
            else:
                check_number(name, value, low=self.low, high=self.high, whole=self.whole)
        except ValueError as error:
            if self.source is None:
                raise
            raise ValueError(f"{error}; published: {self.source}") from None


SEED = Option(high=2**63 - 1, whole=True)
"""Seed of a variant's noise."""


class WrappedOptimizer(OuterOptimizer, ABC):
    """An optimizer around a ready base optimizer, with the same groups and the same state.

    Options and the number of steps taken live in the parameter groups, so a state dict of the
    wrapper holds everything and schedulers of either object work.

    Args:
        optimizer: the base optimizer. Values already set in its parameter groups win; the options fill in
            missing values.
        **options: the value of every option that the class declares.

    Attributes:
        declared: the options of the class by the name of the constructor's argument.

    Raises:
        ValueError: an option has a value outside its bounds, or the base optimizer has an option of its
            own by the same name. Nothing was changed.
    """

    declared: ClassVar[Mapping[str, Option]]

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        self._check(optimizer, options)
        super().__init__(optimizer, {**self._in_groups(options), COUNTER: 0})
        self._closure_passes = ClosurePasses(type(self).__name__)

    @classmethod
    def _check(cls, optimizer: Optimizer, options: Mapping[str, Any]) -> None:
        """Raise ValueError where an option or the base optimizer cannot be used."""
        for name, value in options.items():
            cls.declared[name].check(name, value)
        # An earlier wrapper has written the counter together with its options.
        if COUNTER not in optimizer.defaults:
            refuse_clashes(cls.__name__, cls._in_groups(options).keys() | {COUNTER}, optimizer)
        for group in optimizer.param_groups:
            check_base_group(group)

    @classmethod
    def _in_groups(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {option.key: options[name] for name, option in cls.declared.items() if option.key}

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
        """Return the standard deviation of each parameter's group, float64 ``[1]`` for each parameter."""
        return [
            value
            for group in self.param_groups
            for value in [torch.tensor([deviation(group)], dtype=torch.float64)]
            for parameter in group["params"]
            if parameter.requires_grad
        ]
