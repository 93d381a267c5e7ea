"""Base class of optimizers that change the gradients or weights of a base optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.kernels.table import describe_misfit
from fastsam.optim._engine.autocast import weights_change
from fastsam.optim._engine.closures import CLOSURE_CONTRACT, ClosurePasses
from fastsam.optim._engine.members import refuse_dtype
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
"""Calls the given step of the base optimizer and counts it."""

COUNTER = "steps_taken"


@dataclass(frozen=True)
class Option:
    """Declares an option of a variant. Its default is in the constructor's signature.

    Args:
        key: name in the parameter groups; None for an option that groups do not have.
        low: smallest allowed number.
        high: largest allowed number.
        whole: whether the number must be an integer.
        choices: allowed values of an option that is not a number.
        source: a published value and its source.
    """

    key: str | None = None
    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    choices: tuple[str, ...] = ()
    source: str | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError unless this option allows ``value``."""
        try:
            if self.choices:
                check_choice(name, value, self.choices)
            else:
                check_number(name, value, low=self.low, high=self.high, whole=self.whole)
        except ValueError as error:
            if self.source is None:
                raise
            raise ValueError(f"{error}; published: {self.source}") from None


class WrappedOptimizer(OuterOptimizer, ABC):
    """Base class of optimizers around an existing base optimizer, whose groups and state they share.

    The options and the number of steps taken are stored in the parameter groups. A state dict of either
    object is therefore complete, and learning-rate schedulers may hold either.

    Args:
        optimizer: the base optimizer. Values already set in its parameter groups win; the options fill in
            missing values.
        **options: the value of every option that the class declares.

    Attributes:
        declared: the options of the class by the name of the constructor's argument.

    Raises:
        ValueError: an option is out of bounds, also in a group, or the base optimizer has another option of
            the same name. Nothing was changed.
    """

    declared: ClassVar[Mapping[str, Option]]

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        self._check(optimizer, options)
        super().__init__(optimizer, {**self._in_groups(options), COUNTER: 0})
        self._closure_passes = ClosurePasses(type(self).__name__)

    @classmethod
    def _check(cls, optimizer: Optimizer, options: Mapping[str, Any]) -> None:
        """Raise ValueError if an option or the base optimizer cannot be used."""
        for name, value in options.items():
            cls.declared[name].check(name, value)
        # A counter there means that the options, too, come from an earlier wrapper and do not clash.
        if COUNTER not in optimizer.defaults:
            refuse_clashes(cls.__name__, cls._in_groups(options).keys() | {COUNTER}, optimizer)
        for group in optimizer.param_groups:
            cls._check_group(group)

    @classmethod
    def _check_group(cls, group: Mapping[str, Any]) -> None:
        for option in cls.declared.values():
            if option.key is not None and option.key in group:
                option.check(option.key, group[option.key])
        check_base_group(group)

    @classmethod
    def _in_groups(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {option.key: options[name] for name, option in cls.declared.items() if option.key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._closure_passes = ClosurePasses(type(self).__name__)

    @untraced
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Make one step and return its loss: the loss of the first pass, unless the class documents another.

        Args:
            closure: clears the gradients, runs forward and backward, and returns the loss. It is called
                once per pass, with gradients enabled. Only a step that creates the base optimizer's state, as
                ``torch.distributed.checkpoint`` makes it, needs none.

        Raises:
            TypeError: ``closure`` is missing, or did not return a tensor.
            RuntimeError: the closure did not clear existing gradients. After any error, including one that
                the closure raises, the weights are unchanged.
        """
        if closure is None and self._is_blank():
            return self.base_optimizer.step()  # type: ignore[return-value]
        if closure is None:
            raise TypeError(f"{type(self).__name__}.step needs a closure that {CLOSURE_CONTRACT}")
        return self._loss_of(self._answer(self._passes(self._update), closure))

    def passes(self) -> Passes:
        """Return one step as a generator that yields a :class:`Need` for each gradient.

        Hooks of ``step`` fire around the base optimizer's update. See :func:`fastsam.optim.passes_of`.
        """
        return self._passes(self._hooked_update)

    @abstractmethod
    def _passes(self, update: Update) -> Passes:
        """Yield the needs of one step, and pass the base optimizer's step to ``update`` exactly once."""

    def _answer(self, passes: Passes, closure: Closure) -> list[Tensor]:
        """Run one step with a closure and return the loss of each pass."""
        return self._closure_passes.run(passes, closure, [p for _, p in self._parameters()])

    def _loss_of(self, losses: list[Tensor]) -> Tensor:
        """Return the loss of a step, given the losses of its passes."""
        return losses[0].detach()

    def _update(self, step: Callable[[], Any]) -> None:
        with weights_change():
            step()
        self._opt_called = True  # learning-rate schedulers on this object check that it was stepped
        for group in self.param_groups:
            group[COUNTER] += 1

    _hooked_update = Optimizer.profile_hook_step(_update)

    @property
    def steps_taken(self) -> int:
        """Number of completed steps."""
        return int(self.param_groups[0][COUNTER])

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield every trainable parameter with its group."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield group, parameter


def refuse_unsupported(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError if a dtype has no kernels or a gradient is sparse, before anything is computed."""
    for parameter in parameters:
        refuse_dtype(parameter)
        gradient = parameter.grad
        if gradient is not None and gradient.layout is not torch.strided:
            raise ValueError(describe_misfit(parameter, gradient))
