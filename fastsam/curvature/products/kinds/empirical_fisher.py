"""The empirical Fisher matrix, from the gradients of the samples' losses."""

from __future__ import annotations

from typing import Any

from fastsam.curvature.products.factored import criterion_of, losses_graph
from fastsam.curvature.products.graphs import Graph
from fastsam.curvature.products.kinds.kind import Kind, register_kind
from fastsam.curvature.products.pure import PureLoss


def fisher_graph(loss: PureLoss, batch: Any, number: int) -> Graph:
    """Build the graph with J the Jacobian of the samples' losses and M the inverse of their weights."""
    criterion_of(loss)
    return losses_graph(loss, batch)


register_kind(
    Kind(
        name="empirical-fisher",
        summary="sum(w_i g_i g_i') / sum(w_i) over the gradients g_i of the samples' losses",
        builder=lambda seed: fisher_graph,
    )
)
