"""Steps that call one closure per pass, and detect gradients that the closure fails to clear."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsam.distributed import is_sharded, local_part
from fastsam.optim.passes import Need, Passes, run_passes

CLOSURE_CONTRACT = "clears the gradients, runs forward and backward, and returns the loss"


class ClosurePasses:
    """Runs each pass of a step with one closure, so that every pass starts without gradients.

    Before the first pass, the gradients that the previous step left are dropped. Any other gradient comes
    from elsewhere, such as an earlier micro-batch, and the closure must clear it.

    A hook checks this when autograd reaches a parameter, before it accumulates: a gradient that is still the
    same object at the same version was not cleared. Afterwards it is too late to tell. Autograd accumulates
    in place, or out of place under ``create_graph=True``, and DDP with ``gradient_as_bucket_view=True``
    restores a cleared gradient as the same object. Only a gradient that was not cleared is read on the host,
    because ``zero_grad(set_to_none=False)`` leaves zeros; a loop that clears to None never waits.

    Args:
        owner: name of the optimizer's class, for messages.
        or_else: alternatives to a closure over all micro-batches, for the message on accumulation.
        needs_loss: whether the closure must return a tensor.
    """

    def __init__(self, owner: str, or_else: str = "", *, needs_loss: bool = True) -> None:
        self._owner = owner
        self._needs_loss = needs_loss
        self._or_else = or_else
        self._spent: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def run(
        self, passes: Passes, closure: Callable[[], Any], parameters: Sequence[Tensor]
    ) -> list[Any]:
        """Run one step and return the closure's result of each pass.

        Args:
            passes: the step.
            closure: clears the gradients and makes one pass; called with gradients enabled.
            parameters: parameters whose gradients the closure computes.

        Raises:
            RuntimeError: the closure did not clear a nonzero gradient before the first pass, so the
                gradients may now be sums.
            TypeError: the closure returned no loss, or the step needs a gradient that a closure cannot
                compute.
        """
        one_pass = self._first

        def answer(need: Need) -> Any:
            nonlocal one_pass
            _require_a_plain_pass(need, self._owner)
            result = one_pass(closure, parameters)
            one_pass = self._again
            if self._needs_loss and not isinstance(result, Tensor):
                raise TypeError(
                    f"the closure of {self._owner}.step returned {result!r}; expected a closure that "
                    f"{CLOSURE_CONTRACT}"
                )
            return result

        results = run_passes(passes, answer)
        self._spent = {
            id(p): (weakref.ref(p.grad), _version(p.grad)) for p in parameters if p.grad is not None
        }
        return results

    def _first(self, closure: Callable[[], Any], parameters: Sequence[Tensor]) -> Any:
        self._drop_spent(parameters)
        kept = _Kept(parameters)
        try:
            with torch.enable_grad():
                result = closure()
        finally:
            kept.stop_watching()
        if kept.any_nonzero():
            raise RuntimeError(
                f"{self._owner}.step(closure) found gradients that the closure did not clear, so only its "
                "first pass would include them. A closure must clear the gradients and make one whole pass. "
                f"To accumulate, iterate over all micro-batches inside the closure{self._or_else}"
            )
        return result

    def _again(self, closure: Callable[[], Any], parameters: Sequence[Tensor]) -> Any:
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            return closure()

    def _drop_spent(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            gradient = p.grad
            if gradient is None or id(p) not in self._spent:
                continue
            reference, version = self._spent[id(p)]
            if reference() is gradient and _version(gradient) == version:
                p.grad = None
        self._spent = {}


def _require_a_plain_pass(need: Need, owner: str) -> None:
    """Raise TypeError if a need has a weighting or adds to gradients, which a closure cannot do."""
    # Batches, parts, samples and ranks are up to the closure, so those fields are ignored.
    if need != Need(part=need.part, fresh=need.fresh, local=need.local, ascent=need.ascent):
        raise TypeError(
            f"{owner}.step(closure) cannot answer {need}: a closure computes one gradient of the whole loss. "
            f"Iterate over {owner}.passes() instead"
        )


class _Kept:
    """Watches for gradients that exist before a pass and that the closure does not clear.

    Args:
        parameters: the parameters. Frozen ones are ignored, because nothing is added to their gradients.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._before = {
            id(p): (p, p.grad, _version(p.grad))
            for p in parameters
            if p.grad is not None and p.requires_grad
        }
        # FSDP2 adds to sharded gradients without autograd, so no hook runs before: record now which of them
        # have nonzero elements.
        self._nonzero_shards = {
            key: _any_nonzero(gradient)
            for key, (p, gradient, _) in self._before.items()
            if is_sharded(p)
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
            # Written without autograd: FSDP2 added to it, perhaps after the closure had set it to 0. The two
            # cases look the same, so go by what was there before the pass.
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
    """Return whether the local part of a gradient has a nonzero element, as a tensor on its device."""
    part = local_part(gradient).detach()
    return (part.coalesce().values() if part.is_sparse else part).any()


def _version(gradient: Tensor) -> int:
    """Return the version counter of a gradient's local part, which FSDP2 writes to."""
    return local_part(gradient)._version
