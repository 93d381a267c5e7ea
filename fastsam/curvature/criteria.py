"""Criteria of torch and of users: which they are, and how they reduce the losses of samples."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import nn

_MODULES: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
}


def as_module(criterion: Any) -> Any:
    """Return the module of torch's cross-entropy or negative log-likelihood, if given as a function.

    The options of a ``functools.partial`` of the function become those of the module. Any other
    criterion is returned unchanged.
    """
    options: dict[str, Any] = {}
    function = criterion
    if isinstance(criterion, partial) and not criterion.args:
        function, options = criterion.func, criterion.keywords
    for known, module in _MODULES.items():
        if function is known:
            return module(**options)
    return criterion


def reduction_of(criterion: Any) -> Any:
    """Return the reduction of a criterion or of a ``functools.partial``; ``"mean"`` if it has none."""
    if isinstance(criterion, partial):
        return criterion.keywords.get("reduction", reduction_of(criterion.func))
    return getattr(criterion, "reduction", "mean")


def of_torch(criterion: Any) -> bool:
    """Return whether a criterion is a class or function of torch, or uses its likelihoods."""
    criterion = criterion.func if isinstance(criterion, partial) else criterion
    return (
        type(criterion).__module__ == "torch.nn.modules.loss"
        or getattr(criterion, "__module__", None) == "torch.nn.functional"
        or is_likelihood(criterion)
    )


def is_likelihood(criterion: Any) -> TypeGuard[nn.CrossEntropyLoss | nn.NLLLoss]:
    """Return whether a criterion computes torch's cross-entropy or negative log-likelihood.

    A subclass that overrides forward, such as a focal loss, computes something else.
    """
    forward = getattr(getattr(criterion, "forward", None), "__func__", None)
    return forward in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)
