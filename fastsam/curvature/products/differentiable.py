"""Checks of a loss's graph: parameters out of reach, missing second derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointFunction


def refuse_unreachable(total: Tensor, names: Mapping[int, str]) -> None:
    """Raise ValueError if derivatives by a parameter would be missing or cannot be computed.

    A loss is evaluated with other tensors in the modules. A parameter that it finds elsewhere, such as
    in a list that was made before, would silently be a constant. Reentrant activation checkpointing
    supports neither ``torch.autograd.grad`` nor second derivatives.

    Args:
        total: the loss.
        names: names of the model's own tensors by their ``id``.
    """
    for node in _nodes([total]):
        if getattr(type(node), "_forward_cls", None) is CheckpointFunction:
            raise ValueError(
                "the model uses torch.utils.checkpoint with use_reentrant=True, which cannot be "
                "differentiated twice; set use_reentrant=False, or disable activation checkpointing"
            )
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise ValueError(
                f"the loss uses parameter {name!r} from a list or variable outside the modules, so its "
                "derivative would be missing. Read it from its module whenever the loss is evaluated: "
                "iterate over model.parameters() inside the loss instead of a list made before, and "
                "hold parameters of a module as attributes or in an nn.ParameterList"
            )


def refuse_undifferentiable(forward: Sequence[Tensor], backward: Sequence[Tensor]) -> None:
    """Raise ValueError, with its name, for an operation that can be differentiated only once.

    Autograd reports such an operation only if it reaches it on the way to the parameters. But the
    operation may itself cut that way, and the product would then silently lack its part.

    Args:
        forward: roots of the loss's graph, where custom autograd functions have their names.
        backward: roots of the gradient's graph, where torch's own operations report themselves.
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
                missing(torch.zeros((), device="cpu"))  # raises an error that names the operation
            except RuntimeError as error:
                complaint = complaint or str(error).replace("aten::", "")
    if complaint is not None:
        raise ValueError(
            f"the loss cannot be differentiated twice: {complaint}. Replace this operation by one "
            "that has a second derivative, or exclude the parameters before it with params="
        )


_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def _nodes(roots: Sequence[Tensor]) -> Iterator[Node]:
    """Yield all nodes of the graphs of ``roots``."""
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        following = {parent for parent, _ in node.next_functions if parent is not None}
        waiting += following - seen
        seen |= following
