"""The generalized Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.products.factored import FactoredGraph, criterion_of
from fastsam.curvature.products.graphs import Graph
from fastsam.curvature.products.kinds.kind import Kind, register_kind
from fastsam.curvature.products.pure import PureLoss


def gauss_newton_graph(loss: PureLoss, batch: Any, number: int) -> Graph:
    """Build the graph with J the Jacobian of the outputs and M the Hessian of the loss in them."""
    criterion_of(loss)
    leaves = loss.leaves()
    outputs = loss.call("outputs", leaves, batch)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"kind 'ggn' requires one tensor of outputs, got {type(outputs).__name__}; select it with "
            "fastsam.curvature.OutputLoss"
        )
    point = outputs.detach().requires_grad_()
    value, _ = loss.call("loss", leaves, point, batch)
    with loss.backward_at(leaves):
        (slope,) = torch.autograd.grad(value, point, create_graph=True)

    def middle(vector: Tensor) -> Tensor:
        if not slope.requires_grad:  # the loss is linear in the outputs, so its Hessian is 0
            return torch.zeros_like(vector)
        (image,) = torch.autograd.grad(slope, point, grad_outputs=vector, retain_graph=True)
        return image

    return FactoredGraph(loss, leaves, outputs, middle)


register_kind(
    Kind(
        name="ggn",
        summary=(
            "the generalized Gauss-Newton matrix: the Hessian of the loss with the "
            "model linearized in the parameters"
        ),
        builder=lambda seed: gauss_newton_graph,
    )
)
