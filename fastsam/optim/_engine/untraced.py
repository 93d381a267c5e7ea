"""Functions that ``torch.compile`` runs as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep Dynamo out of ``function`` and of all that it calls, unless that is compiled on its own.

    The native kernels work on addresses, which Dynamo cannot trace: it would warn, break the graph in the
    middle of a step, and guard on numbers that change in every step.
    """
    # torch.compiler.disable imports Dynamo, which takes seconds, when a module is loaded; this one, which
    # decorates torch's own optimizers, when the function is first called.
    return _disable_dynamo(function)
