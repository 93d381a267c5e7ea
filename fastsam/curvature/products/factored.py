"""Curvature matrices of the form J' M J: Gauss-Newton and Fisher.

J is the Jacobian with respect to the parameters of the model's outputs or of the losses of the
samples. M is a symmetric map on the space of these outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.losses import CriterionLoss
from fastsam.curvature.products.pure import PureLoss


class FactoredGraph:
    """The graph of J' M J for one batch.

    Args:
        loss: the loss.
        leaves: the parameters from which ``outputs`` were computed.
        outputs: the outputs whose Jacobian is J.
        middle: applies M to a tensor of the shape of ``outputs``.
    """

    def __init__(
        self,
        loss: PureLoss,
        leaves: tuple[Tensor, ...],
        outputs: Tensor,
        middle: Callable[[Tensor], Tensor],
    ) -> None:
        if not outputs.requires_grad:
            raise ValueError(
                "the outputs do not depend on the chosen parameters; check for detach() in the "
                "model, or choose others with params="
            )
        self._loss = loss
        self._leaves = leaves
        self._outputs = outputs
        self._middle = middle
        # J'u is linear in u, so differentiating <J'u, v> by u gives J v: a forward-mode product from
        # two backward passes, which needs no forward-mode formulas.
        self._dummy = torch.zeros_like(outputs).requires_grad_()
        with loss.backward_at(leaves):
            self._pullback = torch.autograd.grad(
                outputs,
                leaves,
                grad_outputs=self._dummy,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        self._used = [index for index, piece in enumerate(self._pullback) if piece.requires_grad]

    @property
    def roots(self) -> Sequence[Tensor]:
        """The parts of J'u that depend on u."""
        return [self._pullback[index] for index in self._used]

    def product(self, vectors: Tensor, *, batched: bool = False) -> Tensor:
        """Return the products with the rows of ``vectors``."""
        if batched:
            raise ValueError(
                "strategy 'kept-graph-batched' is available only for kind='hessian'; use "
                "'kept-graph'"
            )
        with self._loss.backward_at(self._leaves):
            return torch.stack([self._one(vector) for vector in vectors])

    def _one(self, vector: Tensor) -> Tensor:
        pieces = self._loss.split(vector)
        (pushed,) = torch.autograd.grad(
            [self._pullback[index] for index in self._used],
            self._dummy,
            grad_outputs=[pieces[index] for index in self._used],
            retain_graph=True,
        )
        products = torch.autograd.grad(
            self._outputs,
            self._leaves,
            grad_outputs=self._middle(pushed),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return self._loss.join(products)


def losses_graph(loss: PureLoss, batch: Any, drawn: Tensor | None = None) -> FactoredGraph:
    """Build the graph with J the Jacobian of the samples' losses and M the inverse of their weights."""
    leaves = loss.leaves()
    losses, weights = loss.call("sample_losses", leaves, batch, drawn)
    inverse = torch.where(weights > 0, 1 / weights, 0).to(losses.dtype)
    return FactoredGraph(loss, leaves, losses, lambda vector: vector * inverse)


def criterion_of(loss: PureLoss) -> CriterionLoss:
    """Return the criterion of a loss, and the model's outputs with it.

    Raises:
        ValueError: the loss is a :class:`BatchLoss`.
    """
    if not isinstance(loss.model_loss, CriterionLoss):
        raise ValueError(
            "Gauss-Newton and Fisher matrices require a criterion(outputs, targets) or an OutputLoss, got "
            "a BatchLoss, which does not expose the model's outputs"
        )
    return loss.model_loss
