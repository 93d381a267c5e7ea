"""Curvature matrices of the form J' M J: Gauss-Newton and Fisher.

J is the Jacobian with respect to the parameters of the model's outputs or of the losses of the
samples. M is a symmetric map on the space of these outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsam.curvature.losses import CriterionLoss, is_likelihood, pair
from fastsam.curvature.products import Graph, GraphBuilder, HessianGraph
from fastsam.curvature.pure import PureLoss

CURVATURES = ("hessian", "gauss-newton", "fisher", "fisher-mc")
"""Names of the available curvature matrices.

``gauss-newton``: the generalized Gauss-Newton matrix, the Hessian of the loss with the model
linearized in the parameters. ``fisher``: the empirical Fisher matrix, ``sum(w_i g_i g_i') /
sum(w_i)`` over the gradients g_i of the samples' losses. ``fisher-mc``: the same with one target per
sample drawn from the model's predictive distribution, an unbiased estimate of the Fisher matrix.
"""


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
                "strategy 'kept-graph-batched' is available only for curvature='hessian'; use "
                "'kept-graph'"
            )
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


def gauss_newton_graph(loss: PureLoss, batch: Any, number: int) -> Graph:
    """Build the graph with J the Jacobian of the outputs and M the Hessian of the loss in them."""
    _criterion(loss)
    inputs, targets = pair(batch)
    leaves = loss.leaves()
    outputs = loss.call("outputs", leaves, inputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"gauss-newton requires a model with one output tensor, got {type(outputs).__name__}"
        )
    point = outputs.detach().requires_grad_()
    value, _ = loss.call("loss", leaves, point, targets, samples=len(inputs))
    (slope,) = torch.autograd.grad(value, point, create_graph=True)

    def middle(vector: Tensor) -> Tensor:
        if not slope.requires_grad:  # the loss is linear in the outputs, so its Hessian is 0
            return torch.zeros_like(vector)
        (image,) = torch.autograd.grad(slope, point, grad_outputs=vector, retain_graph=True)
        return image

    return FactoredGraph(loss, leaves, outputs, middle)


def fisher_graph(loss: PureLoss, batch: Any, number: int) -> Graph:
    """Build the graph with J the Jacobian of the samples' losses and M the inverse of their weights."""
    _criterion(loss)
    inputs, targets = pair(batch)
    return _fisher(loss, inputs, targets)


def sampled_fisher(seed: int) -> GraphBuilder:
    """Return :func:`fisher_graph` with targets drawn from the model's predictive distribution."""

    def build(loss: PureLoss, batch: Any, number: int) -> Graph:
        criterion = _criterion(loss).criterion
        if (
            not isinstance(criterion, nn.CrossEntropyLoss)
            or not is_likelihood(criterion)
            or criterion.label_smoothing
        ):
            raise ValueError(
                "fisher-mc samples classes from a softmax, so it requires nn.CrossEntropyLoss without "
                f"label smoothing and without an overridden forward, got {criterion}"
            )
        inputs, targets = pair(batch)
        if targets.is_floating_point():
            raise ValueError("fisher-mc requires class indices as targets, got class probabilities")
        outputs = loss.call("outputs", loss.leaves(), inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"fisher-mc requires a model with one output tensor, got {type(outputs).__name__}"
            )
        outputs = outputs.detach()
        probabilities = outputs.movedim(1, -1).softmax(dim=-1).reshape(-1, outputs.shape[1]).cpu()
        state = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint32)[0])
        generator = torch.Generator().manual_seed(state)
        drawn = torch.multinomial(probabilities.double(), 1, generator=generator)
        drawn = drawn.reshape(targets.shape).to(targets)
        return _fisher(loss, inputs, torch.where(targets == criterion.ignore_index, targets, drawn))

    return build


def _fisher(loss: PureLoss, inputs: Tensor, targets: Tensor) -> Graph:
    leaves = loss.leaves()
    losses, weights = loss.call("sample_losses", leaves, inputs, targets)
    inverse = torch.where(weights > 0, 1 / weights, 0).to(losses.dtype)
    return FactoredGraph(loss, leaves, losses, lambda vector: vector * inverse)


def _criterion(loss: PureLoss) -> CriterionLoss:
    if not isinstance(loss.model_loss, CriterionLoss):
        raise ValueError(
            "Gauss-Newton and Fisher matrices require a criterion(outputs, targets), got a BatchLoss, "
            "which does not expose the model's outputs"
        )
    return loss.model_loss


def graph_builder(curvature: str, *, seed: int) -> GraphBuilder:
    """Return the graph builder of one of :data:`CURVATURES`.

    Raises:
        ValueError: the name is unknown.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}, got {curvature!r}")
    if curvature == "gauss-newton":
        return gauss_newton_graph
    if curvature == "fisher":
        return fisher_graph
    if curvature == "fisher-mc":
        return sampled_fisher(seed)
    return HessianGraph
