"""The Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.products.kinds.kind import Kind, register_kind
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.products.second_order import FastSecondOrder


class HessianGraph:
    """The differentiable gradient of one batch's summed loss."""

    def __init__(self, loss: PureLoss, batch: Any, number: int = 0) -> None:
        self._loss = loss
        self._leaves = loss.leaves()
        # It reads saved tensors in the forward pass, which a checkpoint would compute again there.
        with nullcontext() if loss.recomputes else FastSecondOrder():
            gradients = loss.gradient(batch, self._leaves, differentiable=True)
        # The gradient by a parameter in which the loss is linear has no graph; its products are 0.
        self._curved = [index for index, piece in enumerate(gradients) if piece.requires_grad]
        self._gradients = [gradients[index] for index in self._curved]

    @property
    def roots(self) -> Sequence[Tensor]:
        """The parts of the gradient that depend on the parameters."""
        return self._gradients

    def product(self, vectors: Tensor, *, batched: bool = False) -> Tensor:
        """Return the products with the rows of ``vectors``, by backward passes through the gradient."""
        if not self._curved:
            return torch.zeros_like(vectors)
        if batched:
            return self._backward(vectors, batched=True)
        return torch.stack([self._backward(vector, batched=False) for vector in vectors])

    def _backward(self, vector: Tensor, *, batched: bool) -> Tensor:
        pieces = self._loss.split(vector)
        with self._loss.backward_at(self._leaves):
            products = torch.autograd.grad(
                self._gradients,
                self._leaves,
                grad_outputs=[pieces[index] for index in self._curved],
                retain_graph=True,
                is_grads_batched=batched,
                allow_unused=True,
            )
        # With materialize_grads, torch's zeros for unused leaves would lack the batch dimension.
        lead = vector.shape[:-1]
        return self._loss.join(
            (
                leaf.new_zeros((*lead, *leaf.shape)) if product is None else product
                for product, leaf in zip(products, self._leaves, strict=True)
            ),
            lead=len(lead),
        )


register_kind(
    Kind(
        name="hessian",
        summary="the Hessian of the mean loss",
        builder=lambda seed: HessianGraph,
        is_hessian=True,
    )
)
