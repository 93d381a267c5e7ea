"""Construction of the base optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import LBFGS, Optimizer

from fastsam.optim._engine.outer import OuterOptimizer


def resolve_base(
    owner: str,
    params: Iterable[Any] | None,
    base_optimizer: Callable[..., Optimizer] | None,
    optimizer: Optimizer | None,
    kwargs: dict[str, Any],
) -> Optimizer:
    """Return ``optimizer`` if it is given, else construct the base optimizer from a class and parameters.

    Raises:
        TypeError: both ways were used, or neither; the base optimizer is a wrapper or needs a closure
            (LBFGS); or :func:`construct_base` raises.
    """
    if optimizer is None:
        if params is None or base_optimizer is None:
            raise TypeError(f"{owner} requires params and base_optimizer, or optimizer=")
        return construct_base(base_optimizer, params, kwargs)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer= must be an optimizer instance, got {optimizer!r}; pass a class as "
            f"{owner}(params, base_optimizer)"
        )
    if params is not None or base_optimizer is not None or kwargs:
        raise TypeError(
            "pass either optimizer= (an existing base optimizer, with its parameters and settings) or params "
            "and base_optimizer, not both"
        )
    refuse_unusable(type(optimizer))
    return optimizer


def construct_base(
    base_optimizer: Callable[..., Any],
    params: Iterable[Any],
    kwargs: dict[str, Any],
) -> Optimizer:
    """Construct the base optimizer from a class or another callable.

    Raises:
        TypeError: ``base_optimizer`` does not return an optimizer, or returns a wrapper or one that needs a
            closure (LBFGS).
    """
    if not callable(base_optimizer) or (
        isinstance(base_optimizer, type) and not issubclass(base_optimizer, Optimizer)
    ):
        raise TypeError(
            "base_optimizer must be an optimizer class such as torch.optim.SGD, or a callable that returns "
            f"an optimizer for the parameters, got {base_optimizer!r}; pass an instance as "
            "SAM(optimizer=...)"
        )
    # Checked before the call, because an optimizer writes its defaults into the caller's group dicts.
    refuse_unusable(base_optimizer)
    optimizer = base_optimizer(params, **kwargs)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"base_optimizer must return a torch.optim.Optimizer, got {optimizer!r} from {base_optimizer!r}"
        )
    refuse_unusable(type(optimizer))
    return optimizer


def refuse_unusable(base_optimizer: Callable[..., Any]) -> None:
    """Raise TypeError for a class whose ``step()`` makes passes of its own, or needs a closure for them."""
    if not isinstance(base_optimizer, type):
        return
    if issubclass(base_optimizer, OuterOptimizer):
        raise TypeError(
            f"the base optimizer is a {base_optimizer.__name__}, which wraps another optimizer itself; "
            "expected one whose step() makes the update from existing gradients, such as torch.optim.SGD: "
            "pass its base_optimizer"
        )
    if issubclass(base_optimizer, LBFGS):
        raise TypeError(
            "LBFGS needs a closure, because it evaluates the loss several times in one step(); SAM cannot "
            "wrap it. Choose an optimizer whose step() needs no closure"
        )
