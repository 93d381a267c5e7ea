"""Which operations of a loss lack a second derivative."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node


def refuse_undifferentiable(forward: Sequence[Tensor], backward: Sequence[Tensor]) -> None:
    """Refuse graphs with a function that can be differentiated once only, by its name.

    Autograd reports such a function when it meets it on the way to the parameters; but the function
    also cuts the way to them, and the product would silently lack its part.

    Args:
        forward: roots of the loss's graph, where functions of the user's have their names.
        backward: roots of its gradient's graph, where torch's say what they lack.
    """
    complaint = None
    for node in _nodes(forward):
        function = getattr(type(node), "_forward_cls", None)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if function is not None and code is _ONCE_DIFFERENTIABLE:
            complaint = f"the backward of {function.__name__} is marked with @once_differentiable"
    for node in _nodes(backward):
        if node.name() in ("torch::autograd::Error", "torch::autograd::NotImplemented"):
            missing: Any = node
            try:
                missing(torch.zeros(()))  # says which operation, and nothing else
            except RuntimeError as error:
                complaint = complaint or str(error).replace("aten::", "")
    if complaint is not None:
        raise ValueError(
            f"the loss cannot be differentiated twice: {complaint}. Replace this operation by one "
            "that has a second derivative, or leave the parameters before it out with params="
        )


_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def _nodes(roots: Sequence[Tensor]) -> Iterator[Node]:
    """All nodes of the graphs of ``roots``."""
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        following = {parent for parent, _ in node.next_functions if parent is not None}
        waiting += following - seen
        seen |= following
