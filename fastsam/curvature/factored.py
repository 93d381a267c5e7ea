"""Curvature matrices of the form J' M J: Gauss-Newton and Fisher.

J is the Jacobian of some outputs of the model (its own outputs, or the losses of the samples) with
respect to the parameters, M a symmetric map in the space of those outputs.
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
"""Matrices that a spectrum can be asked of.

``gauss-newton``: the generalised Gauss-Newton matrix, the Hessian of the loss with the model
linearised in its outputs. ``fisher``: the empirical Fisher matrix, ``sum(w_i g_i g_i') / sum(w_i)``
over the gradients of the samples' own losses. ``fisher-mc``: the same with one target drawn from
the model's predictive distribution for each sample, an unbiased estimate of the Fisher matrix.
"""


class FactoredGraph:
    """The graph of J' M J for one batch.

    Args:
        loss: the loss.
        leaves: the parameters from which ``outputs`` were computed.
        outputs: what J is the Jacobian of.
        middle: M, applied to a tensor of the shape of ``outputs``.
    """

    def __init__(
        self,
        loss: PureLoss,
        leaves: tuple[Tensor, ...],
        outputs: Tensor,
        middle: Callable[[Tensor], Tensor],
    ) -> None:
        if not outputs.requires_grad:
            raise ValueError("the outputs do not depend on the chosen parameters (detached?)")
        self._loss = loss
        self._leaves = leaves
        self._outputs = outputs
        self._middle = middle
        # J'u is linear in u, so its derivative by u is J': J v comes out of two backwards.
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
        """J'u, where it depends on u."""
        return [self._pullback[index] for index in self._used]

    def product(self, vectors: Tensor, *, batched: bool = False) -> Tensor:
        """Products with the rows of ``vectors``."""
        if batched:
            raise ValueError(
                "this curvature has no strategy 'kept-graph-batched'; use 'kept-graph'"
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
    """J is the Jacobian of the model's outputs, M the Hessian of the summed loss in the outputs."""
    _criterion(loss)
    inputs, targets = pair(batch)
    leaves = loss.leaves()
    outputs = loss.call("outputs", leaves, inputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"gauss-newton needs a model with one output tensor, got {type(outputs).__name__}"
        )
    point = outputs.detach().requires_grad_()
    value, _ = loss.call("loss", leaves, point, targets, samples=len(inputs))
    (slope,) = torch.autograd.grad(value, point, create_graph=True)

    def middle(vector: Tensor) -> Tensor:
        if not slope.requires_grad:  # a loss linear in the outputs
            return torch.zeros_like(vector)
        (image,) = torch.autograd.grad(slope, point, grad_outputs=vector, retain_graph=True)
        return image

    return FactoredGraph(loss, leaves, outputs, middle)


def fisher_graph(loss: PureLoss, batch: Any, number: int) -> Graph:
    """J is the Jacobian of the samples' losses, M divides by their weights."""
    _criterion(loss)
    inputs, targets = pair(batch)
    return _fisher(loss, inputs, targets)


def sampled_fisher(seed: int) -> GraphBuilder:
    """As :func:`fisher_graph`, with targets drawn from the model's predictive distribution."""

    def build(loss: PureLoss, batch: Any, number: int) -> Graph:
        criterion = _criterion(loss).criterion
        if (
            not isinstance(criterion, nn.CrossEntropyLoss)
            or not is_likelihood(criterion)
            or criterion.label_smoothing
        ):
            raise ValueError(
                "fisher-mc draws classes from a softmax, so it needs nn.CrossEntropyLoss with "
                "torch's own forward and without label smoothing"
            )
        inputs, targets = pair(batch)
        if targets.is_floating_point():
            raise ValueError("fisher-mc needs class indices as targets, got class probabilities")
        outputs = loss.call("outputs", loss.leaves(), inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"fisher-mc needs a model with one output tensor, got {type(outputs).__name__}"
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
            "Gauss-Newton and Fisher matrices need a criterion(outputs, targets); a BatchLoss "
            "does not say "
            "what the model's outputs are"
        )
    return loss.model_loss


def graph_builder(curvature: str, *, seed: int) -> GraphBuilder:
    """The builder of one of :data:`CURVATURES`.

    Raises:
        ValueError: an unknown name.
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
