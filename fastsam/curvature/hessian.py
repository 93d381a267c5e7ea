"""The Hessian of a model's loss over a data set, as an operator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.curvature.data import Batches, tensors_of
from fastsam.curvature.losses import BatchLoss, LossFunction, make_objective
from fastsam.curvature.products import STRATEGIES, Product, PureLoss, gradient, parameter_names


class HessianOperator:
    """Hessian of (sum of losses) / (sum of weights) with respect to chosen parameters.

    The model must be in evaluation mode while the operator is used; see
    :func:`fastsam.curvature.isolation.undisturbed`.

    Args:
        model: any module whose parameters are on one device.
        loss_fn: criterion or :class:`BatchLoss`.
        batches: the data.
        params: names of parameters or layers; None for all that require a gradient.
        dtype: float32 or float64 for weights, data and vectors; None for the parameters' own dtype,
            at least float32.
        strategy: one of :data:`fastsam.curvature.products.STRATEGIES`, or ``"auto"``.

    Attributes:
        loss: the mean loss.
        weight: sum of the weights (the number of samples when unweighted).
        gradient_norm: 2-norm of the mean loss's gradient over the chosen parameters.
        weight_norm: 2-norm of the chosen parameters.
        strategy: the strategy in use.

    Raises:
        ValueError: unknown names, no parameter, a loss that is random, not finite, or does not
            depend on the parameters, a total weight that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | BatchLoss,
        batches: Batches,
        *,
        params: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        strategy: str = "auto",
    ) -> None:
        if strategy != "auto" and strategy not in STRATEGIES:
            raise ValueError(
                f"strategy must be 'auto' or one of {', '.join(STRATEGIES)}, got {strategy!r}"
            )
        objective = make_objective(model, loss_fn)
        names = parameter_names(model, params)
        self._loss = PureLoss(objective, names, dtype=_run_dtype(model, names, dtype))
        self._batches = batches
        self._survey()
        if not batches.held and strategy in ("kept-graph", "linearize"):
            raise ValueError(
                f"strategy {strategy!r} holds every batch, but data is read anew at each "
                "product; use 'rebuild'"
            )
        self.strategy = strategy
        if strategy == "auto":
            self.strategy = "kept-graph" if batches.held else "rebuild"
        self._product: Product | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (self._loss.dimension, self._loss.dimension)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, data and vectors."""
        return self._loss.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._loss.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the rows of ``vectors`` ``[probes, n]``."""
        try:
            if self._product is None:
                self._product = STRATEGIES[self.strategy](self._loss, self._batches)
            return self._product(vectors) / self.weight
        except RuntimeError as error:
            if "derivative" in str(error) or "differentiate twice" in str(error):
                raise ValueError(
                    f"the loss cannot be differentiated twice (strategy {self.strategy!r}): {error}"
                ) from error
            raise

    def _survey(self) -> None:
        """One gradient over all data: the numbers beside the spectrum, and the early errors."""
        total_loss = torch.zeros((), dtype=torch.float64)
        total_weight = torch.zeros((), dtype=torch.float64)
        total_gradient = torch.zeros(self._loss.dimension, dtype=self.dtype, device=self.device)
        for index, batch in enumerate(self._batches):
            placed = self._loss.place(batch)
            leaves = self._loss.leaves()
            with torch.no_grad():
                loss, weight = self._loss(leaves, placed)
            if not bool(torch.isfinite(loss)):
                raise ValueError(
                    f"the loss of batch {index} is {float(loss)}: {_blame(self._loss, placed)}"
                )
            if index == 0:
                self._refuse_random(float(loss), leaves, placed)
            total_loss += loss.double().cpu()
            total_weight += weight.double().cpu()
            total_gradient += self._loss.join(
                gradient(self._loss, placed, leaves, differentiable=False)
            )
        self.weight = float(total_weight)
        if not self.weight > 0:
            raise ValueError(
                f"the losses have total weight {self.weight}; it must be positive (is every "
                "target ignored?)"
            )
        self.loss = float(total_loss) / self.weight
        self.gradient_norm = float(total_gradient.double().norm()) / self.weight
        squares = sum(float(value.double().square().sum()) for value in self._loss.values)
        self.weight_norm = squares**0.5

    def _refuse_random(self, first: float, leaves: Any, batch: Any) -> None:
        with torch.no_grad():
            second = float(self._loss(leaves, batch)[0])
        if abs(first - second) > 1e-5 * max(abs(first), abs(second)):
            raise ValueError(
                "the loss is random: two evaluations of the same batch in evaluation mode gave "
                f"{first} and {second}. "
                "Is dropout left on (F.dropout without training=self.training)?"
            )


def _run_dtype(model: nn.Module, names: list[str], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        return dtype
    parameters = dict(model.named_parameters())
    widest = torch.float32
    for name in names:
        widest = torch.promote_types(widest, parameters[name].dtype)
    return widest


def _blame(loss: PureLoss, batch: Any) -> str:
    if any(
        bool(tensor.isnan().any()) for tensor in tensors_of(batch) if tensor.is_floating_point()
    ):
        return "the data hold NaN"
    if not all(bool(torch.isfinite(value).all()) for value in loss.values):
        return "the parameters are not finite"
    return "the data and the parameters are finite, so the model or the loss overflows"
