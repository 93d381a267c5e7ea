"""Construction of the base optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import LBFGS, Optimizer


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
    return optimizer


def refuse_lbfgs(made_by: Callable[..., Any]) -> None:
    if isinstance(made_by, type) and issubclass(made_by, LBFGS):
        raise TypeError(
            "LBFGS evaluates the loss as often as it likes within one step() and needs a closure for it; "
            "SAM makes two evaluations a step: choose an optimizer whose step() needs no closure"
        )
