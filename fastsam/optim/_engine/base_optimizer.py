"""Construction of the base optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import LBFGS, Optimizer


def made_or_ready(
    owner: str,
    params: Iterable[Any] | None,
    base_optimizer: Callable[..., Optimizer] | None,
    optimizer: Optimizer | None,
    kwargs: dict[str, Any],
) -> Optimizer:
    """Return the base optimizer of a constructor that takes a class and parameters, or a ready instance.

    Raises:
        TypeError: both ways were used, or neither; or as :func:`made` does.
    """
    if optimizer is None:
        if params is None or base_optimizer is None:
            raise TypeError(f"{owner} needs params and base_optimizer, or optimizer=")
        return made(base_optimizer, params, kwargs)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer= takes a ready optimizer, got {optimizer!r}; a class is passed as "
            f"{owner}(params, base_optimizer)"
        )
    if params is not None or base_optimizer is not None or kwargs:
        raise TypeError(
            "pass either optimizer= (a ready base optimizer, which has its parameters and "
            "settings already) or params and base_optimizer, not both"
        )
    refuse_lbfgs(type(optimizer))
    return optimizer


def made(
    base_optimizer: Callable[..., Any],
    params: Iterable[Any],
    kwargs: dict[str, Any],
) -> Optimizer:
    """Return the base optimizer that a class, or another callable, makes of ``params``.

    Raises:
        TypeError: ``base_optimizer`` makes no optimizer, or one that needs a closure (LBFGS).
    """
    if not callable(base_optimizer) or (
        isinstance(base_optimizer, type) and not issubclass(base_optimizer, Optimizer)
    ):
        raise TypeError(
            f"base_optimizer must be an optimizer class such as torch.optim.SGD, or a callable that makes an "
            f"optimizer of the parameters, got {base_optimizer!r}; pass a ready instance as "
            "SAM(optimizer=...)"
        )
    # Before it is called: an optimizer writes its defaults into the dicts of the groups it is given.
    refuse_lbfgs(base_optimizer)
    optimizer = base_optimizer(params, **kwargs)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"base_optimizer must make a torch.optim.Optimizer of the parameters, got {optimizer!r} of "
            f"{base_optimizer!r}"
        )
    refuse_lbfgs(type(optimizer))
    return optimizer


def refuse_lbfgs(made_by: Callable[..., Any]) -> None:
    if isinstance(made_by, type) and issubclass(made_by, LBFGS):
        raise TypeError(
            "LBFGS evaluates the loss as often as it likes within one step() and needs a closure for it; "
            "SAM makes two evaluations a step: choose an optimizer whose step() needs no closure"
        )
