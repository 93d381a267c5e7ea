"""The gradients that an optimizer's step asks for, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Need:
    """Ask the caller of an optimizer's step to put a gradient into ``.grad``.

    Args:
        weighting: name of the weighting of the loss, which the caller's objective resolves; ``"all"``
            is the loss itself.
        part: ``(i, n)``: use the i-th of n parts of the batch, counted from 0. Default: the whole batch.
        fresh: use a new batch. The first pass of a step has a new batch in any case.
        add: add to ``.grad``; the default clears it first.
        local: use the gradient of this rank alone, not reduced over ranks.
        ascent: the gradient only directs an ascent. The caller may answer with that of a sample of the batch.
    """

    weighting: str = "all"
    part: tuple[int, int] = (0, 1)
    fresh: bool = False
    add: bool = False
    local: bool = False
    ascent: bool = False


Passes: TypeAlias = Generator[Need, Tensor | None, None]
"""One step of an optimizer: yields a :class:`Need` for each pass and receives the pass's detached loss.

None instead of a loss, with no gradient in any parameter, skips the step where the optimizer can skip one.
Closing the generator gives the step up and restores the weights bit for bit.
"""


def passes_of(optimizer: Optimizer) -> Passes:
    """Return one step of any optimizer as a generator of the gradients it needs.

    Args:
        optimizer: one of fastsam's, or any other whose ``step()`` needs no closure.

    Returns:
        ``optimizer.passes()`` where the optimizer has it. Otherwise a generator that asks for one gradient
        and then calls ``optimizer.step()``.

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
        passes: the step. One that waits at a need already is told that the gradient is there.
        answer: puts the gradient into ``.grad`` and returns the loss.

    Returns:
        What ``answer`` returned for each need.
    """
    losses: list[Any] = []
    sent: Tensor | None = None
    try:
        while True:
            try:
                need = passes.send(sent)
            except StopIteration:
                return losses
            loss = answer(need)  # a StopIteration that it raises is the caller's
            losses.append(loss)
            sent = loss.detach() if isinstance(loss, Tensor) else loss
    finally:
        passes.close()


def _single_pass(optimizer: Optimizer) -> Passes:
    yield Need()
    optimizer.step()
