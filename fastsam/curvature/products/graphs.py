"""Graphs of batches, through which products are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from fastsam.curvature.products.pure import PureLoss


class Graph(Protocol):
    """The differentiable graph of one batch, through which products are computed."""

    @property
    def roots(self) -> Sequence[Tensor]:
        """The tensors at which the backward passes of products start."""

    def product(self, vectors: Tensor, *, batched: bool = False) -> Tensor:
        """Return the products with the rows of ``vectors``; ``batched`` vectorizes over them."""


GraphBuilder = Callable[[PureLoss, Any, int], Graph]
"""Builds the graph of a batch on the run's device; the integer is the index of the batch."""
