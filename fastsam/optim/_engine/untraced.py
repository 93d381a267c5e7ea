"""Functions that ``torch.compile`` does not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Exclude ``function`` and its callees from Dynamo, unless a callee is compiled separately.

    The native kernels work on addresses, which Dynamo cannot trace. It would warn, break the graph in the
    middle of a step, and guard on numbers that change in every step.
    """
    # torch.compiler.disable would import Dynamo, which takes seconds, when a module is loaded. This private
    # form, which torch's own optimizers use, imports it when the function is first called.
    return _disable_dynamo(function)
