"""The mean loss over all data as a function of a vector of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fastsam.curvature.data import Batches
from fastsam.curvature.losses import (
    BatchLoss,
    CriterionLoss,
    LossFunction,
    ModelLoss,
    OutputLoss,
    make_model_loss,
    unwrapped,
)
from fastsam.curvature.operators.model import run_dtype
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.products.selection import parameter_names


class MeanLoss:
    """(sum of losses) / (sum of loss weights) over all data, at any values of the chosen parameters.

    The model's tensors are never modified. The model must be in evaluation mode while the object is
    used; see :func:`fastsam.curvature.isolation.undisturbed`.

    Args:
        model: any module with all parameters on one device.
        loss_fn: as in :func:`fastsam.spectral_density`.
        batches: the data.
        params: names of parameters or layers; None for all that require a gradient.
        dtype: dtype of weights and data, float32 or float64; None for that of the parameters, at
            least float32.
        metric: a second quantity to average, in any form that ``loss_fn`` can have. If both are
            criteria, one forward pass serves both.

    Attributes:
        loss: the summed loss.
        batches: the data.
        origin: the model's values of the chosen parameters, ``[n]``.

    Raises:
        TypeError, ValueError: an argument is invalid, or the loss is random.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | OutputLoss | BatchLoss,
        batches: Batches,
        *,
        params: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        metric: LossFunction | BatchLoss | None = None,
    ) -> None:
        model = unwrapped(model)
        names = parameter_names(model, params)
        dtype = run_dtype(model, names, dtype)
        self.loss = PureLoss(make_model_loss(model, loss_fn), names, dtype=dtype)
        self._metric: PureLoss | None = None
        if metric is not None:
            self._metric = PureLoss(_metric_loss(model, loss_fn, metric), names, dtype=dtype)
        self.batches = batches
        self.origin = self.loss.join(self.loss.values)
        first = self.loss.place(next(iter(batches)))
        self.loss.refuse_random(first, float(self.loss(self.loss.leaves(), first)[0].detach()))
        if self._metric is not None:  # the first call reports parameters that it cannot follow
            self._metric(self._metric.values, first)

    def at(self, point: Tensor) -> tuple[float, float | None]:
        """Return the mean loss and the mean metric (None without a metric) at ``point``, ``[n]``.

        Raises:
            ValueError: the total weight is not positive.
        """
        # Values that require no gradient: no graph of the parameters is kept.
        values = self.loss.split(point)
        losses, metrics = _Sums(), _Sums()
        for batch in self.batches:
            placed = self.loss.place(batch)
            if self._metric is None:
                losses.add(*self.loss(values, placed))
            elif isinstance(self._metric.model_loss, CriterionLoss):
                outputs = self.loss.call("outputs", values, placed)
                losses.add(*self.loss.call("loss", values, outputs, placed))
                metrics.add(*self._metric.call("loss", values, outputs, placed))
            else:
                losses.add(*self.loss(values, placed))
                metrics.add(*self._metric(values, placed))
        loss = _mean(losses.total, losses.weight)
        return loss, None if self._metric is None else _mean(metrics.total, metrics.weight)

    def with_gradient(self, point: Tensor) -> tuple[float, Tensor]:
        """Return the mean loss and its gradient ``[n]`` at ``point``, ``[n]``.

        Raises:
            ValueError: the total weight is not positive, or the loss does not depend on the
                parameters.
        """
        total, weight, gradient = self.sums_with_gradient(point)
        return _mean(total, weight), gradient / weight

    def sums_with_gradient(self, point: Tensor) -> tuple[float, float, Tensor]:
        """Return the sum of losses, the sum of loss weights, and the gradient ``[n]`` of the former.

        Raises:
            ValueError: the loss does not depend on the parameters.
        """
        leaves = tuple(value.detach().requires_grad_() for value in self.loss.split(point))
        sums = _Sums()
        gradient = torch.zeros_like(point)
        for batch in self.batches:
            total, weight = self.loss(leaves, self.loss.place(batch))
            pieces = self.loss.derivative(total, leaves, differentiable=False)
            gradient += self.loss.join(pieces)
            sums.add(total, weight)
        return sums.total, sums.weight, gradient

    def over(self, batches: Batches) -> MeanLoss:
        """Return the same function over other data."""
        return self._changed(lambda loss: loss, batches)

    def with_constants(self, values: Mapping[str, Tensor]) -> MeanLoss:
        """Return the same function with other values of parameters and buffers that are not chosen."""
        return self._changed(lambda loss: loss.with_constants(values), self.batches)

    def _changed(self, change: Callable[[PureLoss], PureLoss], batches: Batches) -> MeanLoss:
        twin = copy.copy(self)
        twin.batches = batches
        twin.loss = change(self.loss)
        twin._metric = None if self._metric is None else change(self._metric)
        return twin


class _Sums:
    """Accumulates a sum of losses and the sum of its weights in float64."""

    def __init__(self) -> None:
        self.total = 0.0
        self.weight = 0.0

    def add(self, total: Tensor, weight: Tensor) -> None:
        self.total += float(total.detach())
        self.weight += float(weight)


def _mean(total: float, weight: float) -> float:
    if not weight > 0:
        raise ValueError(
            f"the losses have the total weight {weight}; it must be positive: check whether the data "
            "are empty or every target is ignored"
        )
    return total / weight


def _metric_loss(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    metric: LossFunction | BatchLoss,
) -> ModelLoss:
    """Combine the model and a metric, which takes outputs and targets from where ``loss_fn`` does.

    Raises:
        TypeError: the metric needs outputs and targets, but a :class:`BatchLoss` has none.
    """
    if isinstance(metric, BatchLoss):
        return make_model_loss(model, metric)
    if not callable(metric):
        raise TypeError(
            f"metric must be a function of outputs and targets, or a BatchLoss, got {metric!r}"
        )
    if isinstance(loss_fn, BatchLoss):
        raise TypeError(
            "metric is a function of outputs and targets, which a BatchLoss does not have; pass "
            "metric=fastsam.curvature.BatchLoss(lambda model, batch: (metric_sum, weight))"
        )
    if isinstance(loss_fn, OutputLoss):
        return make_model_loss(model, OutputLoss(loss_fn.outputs, loss_fn.targets, metric))
    return make_model_loss(model, metric)
