"""Optimizer steps as generators: each yields a request for every gradient that it needs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Need:
    """A request of an optimizer's step: the caller must put this gradient into ``.grad``.

    Args:
        weighting: name of the weighting of the loss, which the caller's objective resolves. Default
            ``"all"``: the loss itself.
        part: ``(i, n)``: use the i-th of n parts of the batch, counted from 0. Default: the whole batch.
        fresh: use a new batch. The first pass of a step always has a new batch.
        add: add to ``.grad``. Default False: clear it first.
        local: use this rank's gradient, not reduced over ranks.
        ascent: the gradient only sets the direction of an ascent. The caller may compute it from a sample of
            the batch.
    """

    weighting: str = "all"
    part: tuple[int, int] = (0, 1)
    fresh: bool = False
    add: bool = False
    local: bool = False
    ascent: bool = False


Passes: TypeAlias = Generator[Need, Tensor | None, None]
"""One step of an optimizer: yields a :class:`Need` for each pass and receives the pass's detached loss.

Send None instead of a loss and leave no gradient to skip the step, if the optimizer supports it. Closing the
generator abandons the step and restores the weights bit for bit.
"""


def passes_of(optimizer: Optimizer) -> Passes:
    """Return one step of any optimizer as a generator that yields a :class:`Need` for each gradient.

    Args:
        optimizer: an optimizer of fastsam, or any other whose ``step()`` needs no closure.

    Returns:
        ``optimizer.passes()`` if the optimizer has this method. Otherwise a generator that yields one
        :class:`Need` and then calls ``optimizer.step()``.

    Example:
        >>> import torch
        >>> from fastsam.optim import passes_of
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> for need in passes_of(optimizer):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        >>> weight.detach()
        tensor([0.5000, 0.5000])
    """
    passes: Callable[[], Passes] | None = getattr(optimizer, "passes", None)
    return _single_pass(optimizer) if passes is None else passes()


def run_passes(passes: Passes, answer: Callable[[Need], Any]) -> list[Any]:
    """Run one step: answer every need, send back the detached loss, and close the step on an error.

    Args:
        passes: the step. If it already waits at a need, it continues as if that need was answered.
        answer: puts the gradient into ``.grad`` and returns the loss.

    Returns:
        The results of ``answer``, one for each need.
    """
    losses: list[Any] = []
    sent: Tensor | None = None
    try:
        while True:
            try:
                need = passes.send(sent)
            except StopIteration:
                return losses
            loss = answer(
                need
            )  # outside the try: a StopIteration raised here is not the end of the step
            losses.append(loss)
            sent = loss.detach() if isinstance(loss, Tensor) else loss
    finally:
        passes.close()


def _single_pass(optimizer: Optimizer) -> Passes:
    yield Need()
    optimizer.step()
