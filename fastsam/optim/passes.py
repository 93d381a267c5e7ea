"""The passes that an optimizer makes by calling a closure: no gradient of one reaches another."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsam.optim import sharding


class ClosurePasses:
    """Call one closure for several passes, each from no gradient.

    Gradients of the last step are spent: they are dropped before the first pass. Others that are there
    before it came from somewhere else, such as an earlier micro-batch, and the closure must clear them.
    Whether it does shows when autograd reaches a parameter, in a hook before it adds: a gradient that is
    still the same object at the same version was kept. Afterwards it could not be told, because autograd
    adds in place, or out of place under ``create_graph=True``, and DDP with ``gradient_as_bucket_view=True``
    puts a cleared gradient back as the same object. The host reads a device only where a gradient was kept,
    to allow for the zeros of ``zero_grad(set_to_none=False)``; a loop that clears to None never waits.

    Args:
        owner: class of the optimizer, for messages.
        or_else: what to do instead of accumulating, besides a closure that goes over all micro-batches.
    """

    def __init__(self, owner: str, or_else: str = "") -> None:
        self._owner = owner
        self._or_else = or_else
        self._spent: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def first(self, closure: Callable[[], Any], parameters: Sequence[Tensor]) -> Any:
        """Run the first pass of a step, gradients enabled, and return what the closure returns.

        Raises:
            RuntimeError: the closure kept a gradient that is not 0. The gradients may be sums then.
        """
        self._drop_spent(parameters)
        kept = _Kept(parameters)
        try:
            with torch.enable_grad():
                result = closure()
        finally:
            kept.stop_watching()
        if kept.any_nonzero():
            raise RuntimeError(
                f"{self._owner}.step(closure) found gradients that the closure did not clear: its first pass "
                "would add to them, and no later pass could. A closure must clear the gradients and make one "
                f"whole pass. To accumulate, let it go over all micro-batches{self._or_else}"
            )
        return result

    def again(self, closure: Callable[[], Any], parameters: Iterable[Tensor]) -> Any:
        """Run a further pass of the same step, from no gradient."""
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            return closure()

    def finish(self, parameters: Iterable[Tensor]) -> None:
        """Remember that the step has used the gradients there are now."""
        self._spent = {
            id(p): (weakref.ref(p.grad), _version(p.grad)) for p in parameters if p.grad is not None
        }

    def _drop_spent(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            gradient = p.grad
            if gradient is None or id(p) not in self._spent:
                continue
            reference, version = self._spent[id(p)]
            if reference() is gradient and _version(gradient) == version:
                p.grad = None
        self._spent = {}


class _Kept:
    """Gradients that a closure finds and does not clear.

    Args:
        parameters: those that are frozen are left out: nothing is added to their gradients.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._before = {
            id(p): (p, p.grad, _version(p.grad))
            for p in parameters
            if p.grad is not None and p.requires_grad
        }
        # FSDP2 adds to sharded gradients without autograd, and no hook sees what is there.
        self._nonzero_shards = {
            key: _any_nonzero(gradient)
            for key, (p, gradient, _) in self._before.items()
            if sharding.is_sharded(p)
        }
        self._flags: dict[torch.device, list[Tensor]] = defaultdict(list)
        self._reached: set[int] = set()
        self._handles = [
            p.register_hook(partial(self._before_adding, key))  # type: ignore[no-untyped-call]
            for key, (p, _, _) in self._before.items()
        ]

    def _before_adding(self, key: int, incoming: Tensor) -> None:
        if key not in self._reached:
            self._reached.add(key)
            self._note_if_kept(key)

    def _note_if_kept(self, key: int) -> None:
        parameter, gradient, version = self._before[key]
        if parameter.grad is not gradient:
            return
        flag = None
        if _version(gradient) == version:
            flag = _any_nonzero(gradient)
        elif key not in self._reached:
            # Written without autograd: FSDP2 added to it, or it was set to 0 first, which cannot be told.
            flag = self._nonzero_shards.get(key)
        if flag is not None:
            self._flags[flag.device].append(flag)

    def stop_watching(self) -> None:
        for handle in self._handles:
            handle.remove()

    def any_nonzero(self) -> bool:
        for key in self._before.keys() - self._reached:
            self._note_if_kept(key)
        return any(bool(torch.stack(flags).any()) for flags in self._flags.values())


def _any_nonzero(gradient: Tensor) -> Tensor:
    """Whether this rank's part of a gradient has an element that is not 0, on its device."""
    part = sharding.local(gradient).detach()
    return (part.coalesce().values() if part.is_sparse else part).any()


def _version(gradient: Tensor) -> int:
    """Grows with every write in place; FSDP2 writes to the local part of a gradient."""
    return sharding.local(gradient)._version
