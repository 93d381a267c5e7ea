"""Directions of negative curvature, and the gradients of SGD and SAM along them.

The report tests a theorem of Rangwani et al. (NeurIPS 2022), which rests on a condition of
Daneshmand et al. (ICML 2018). Let v be the eigenvector of lambda_min and g_z the gradient of a
minibatch z. Then the second moment of the SAM gradient's component along v is ``(1 + rho
lambda_min)^2 E<v, g_z>^2``. The theorem replaces the Hessian of z by the full Hessian, and the
unnormalized SAM gradient ``g_z(w + rho g_z(w))`` by its first-order Taylor expansion.

**Amplification of the second moment is not escape.** The factor before squaring is negative for
``lambda_min < -1 / rho``. On a quadratic the expected step then points back to the saddle, which is
an attractor wherever the squared factor exceeds 1 (``lambda_min < -2 / rho``). Besides the second
moments, the report therefore has the mean factor and the growth of the mean component under
gradient descent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsam.curvature.data import read_batches
from fastsam.curvature.eigenpairs import MAX_PRODUCTS, eigenpairs, subspace_size
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss, make_model_loss, unwrapped
from fastsam.curvature.operators.model import ModelOperator, run_dtype
from fastsam.curvature.options import operator_options
from fastsam.curvature.prepared import prepared_run
from fastsam.curvature.products.kinds.hessian import HessianGraph
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.products.selection import parameter_names
from fastsam.kernels.backends import widened
from fastsam.progress import ProgressBar

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastsam.curvature.options import OperatorKeywords


@dataclass(frozen=True, eq=False)
class NegativeCurvature:
    """The smallest eigenvalue of a Hessian and its direction.

    Attributes:
        value: Rayleigh quotient of ``direction``.
        residual: ``||H v - value v||`` and the largest error by rounding: an eigenvalue is within this
            distance of ``value``.
        direction: unit vector as a tensor of each parameter's shape, by parameter name.
        gradient_component: component along ``direction`` of the gradient of the mean loss.
        gradient_norm: 2-norm of that gradient. If it is not small, the weights are not at a saddle
            despite the negative curvature.
        loss: mean loss.
    """

    value: float
    residual: float
    direction: dict[str, Tensor]
    gradient_component: float
    gradient_norm: float
    loss: float


def negative_curvature(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    *,
    tol: float = 1e-5,
    subspace: int | None = None,
    max_products: int = MAX_PRODUCTS,
    seed: int = 0,
    progress: bool = True,
    **options: Unpack[OperatorKeywords],
) -> NegativeCurvature:
    """Compute the smallest eigenvalue of the Hessian of the mean loss, with its eigenvector.

    Args:
        model: as in :func:`fastsam.spectral_density`.
        loss_fn: as in :func:`fastsam.spectral_density`.
        data: as in :func:`fastsam.spectral_density`.
        tol: as in :func:`eigenpairs`, also ``subspace``, ``max_products``, ``seed`` and ``progress``.
        subspace: see ``tol``.
        max_products: see ``tol``.
        seed: see ``tol``.
        progress: see ``tol``.
        **options: fields of :class:`fastsam.curvature.SpectrumOptions` that describe the operator.

    Raises:
        ValueError: as in :func:`fastsam.spectral_density`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> found = negative_curvature(model, nn.CrossEntropyLoss(), batch)
        >>> sorted(found.direction)
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    if options.get("shard") == "probes":
        raise ValueError("an eigenpair has no probes to split over ranks; pass shard='samples'")
    chosen = operator_options(
        options, seed=seed, progress=progress, steps=subspace_size(1, subspace) + 1
    )
    with prepared_run(model, loss_fn, data, chosen) as run:
        operator = run.operator
        found = eigenpairs(
            operator,
            which="smallest",
            tol=tol,
            subspace=subspace,
            max_products=max_products,
            seed=seed,
            basis=chosen.basis,
            memory_limit=chosen.memory_limit,
            progress=run.options.progress,
        )
    vector = found.vectors[0]
    return NegativeCurvature(
        value=float(found.values[0]),
        residual=float(found.residuals[0]) + found.resolution,
        direction=operator.split(vector),
        gradient_component=float(widened(operator.gradient) @ widened(vector)),
        gradient_norm=float(widened(operator.gradient).norm()),
        loss=operator.loss,
    )


@dataclass(frozen=True)
class EscapeReport:
    """Second moments along a direction v of curvature lambda = v'Hv, over minibatches z.

    All moments are means over the minibatches. ``g`` is the gradient of a minibatch, ``s`` the SAM
    gradient ``g(w + rho g(w))`` (unnormalized) or ``g(w + rho g(w) / ||g(w)||)`` (normalized).

    Attributes:
        curvature: lambda, over the whole data.
        rho: size of the ascent step.
        batches: number of minibatches.
        sgd: E<v, g>^2.
        sam: E<v, s>^2 of the unnormalized form.
        sam_normalized: E<v, s>^2 of the normalized form.
        predicted_factor: ``(1 + rho lambda)^2``, the prediction of the theorem.
        factor: ``sam / sgd``, measured.
        predicted_factor_normalized: ``E (1 + rho lambda / ||g||)^2 <v, g>^2 / sgd``, the same
            prediction with the effective step of each minibatch.
        factor_normalized: ``sam_normalized / sgd``, measured.
        taylor_error: ``E |<v, s - (g + rho H_z g)>|^2 / sam``, the error of the first-order
            expansion; H_z is the Hessian of the minibatch.
        hessian_error: ``E |rho <v, (H_z - H) g>|^2 / sam``, the error of replacing the minibatch's
            Hessian by the full one.
        mean_factor: ``E<v, s> / E<v, g>``, signed; negative if SAM's mean step has the opposite
            direction.
        predicted_mean_factor: ``1 + rho lambda``.
        growth: ``lambda (1 + rho lambda)``. A step of gradient descent with SAM's mean gradient and
            learning rate eta multiplies a displacement along v by ``1 - eta * growth``. If lambda is
            negative and the growth positive, the saddle attracts, whatever the second moment.
    """

    curvature: float
    rho: float
    batches: int
    sgd: float
    sam: float
    sam_normalized: float
    predicted_factor: float
    factor: float
    predicted_factor_normalized: float
    factor_normalized: float
    taylor_error: float
    hessian_error: float
    mean_factor: float
    predicted_mean_factor: float
    growth: float

    @property
    def amplifies(self) -> bool:
        """Whether the measured second moment along v is larger under SAM than under SGD."""
        return self.factor > 1

    @property
    def attracts(self) -> bool:
        """Whether SAM's mean step contracts toward a saddle along v, so that it does not escape."""
        return self.curvature < 0 and self.growth > 0

    def as_dict(self) -> dict[str, float | int | bool]:
        """Return all values by name, for tables and JSON."""
        return {**asdict(self), "amplifies": self.amplifies, "attracts": self.attracts}


def escape_report(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    minibatches: Any,
    direction: dict[str, Tensor],
    *,
    rho: float,
    dtype: torch.dtype | None = None,
    freeze: int | None = None,
    progress: bool = True,
) -> EscapeReport:
    """Measure the gradients of SGD and SAM along a direction over many minibatches.

    Args:
        model: as in :func:`fastsam.spectral_density`; it runs in evaluation mode.
        loss_fn: as in :func:`fastsam.spectral_density`.
        minibatches: an iterable of batches; each is one sample of z.
        direction: a vector by parameter name, as in :attr:`NegativeCurvature.direction`. It is
            normalized here.
        rho: size of the ascent step.
        dtype: dtype of weights and data. Default None: that of the parameters, at least float32.
        freeze: as in :func:`fastsam.spectral_density`.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        ValueError: rho is negative or not finite, the direction does not match the model or is zero,
            or no minibatch has a gradient along it.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(5)]
        >>> found = negative_curvature(model, nn.CrossEntropyLoss(), batches)
        >>> escape_report(model, nn.CrossEntropyLoss(), batches, found.direction, rho=0.05).batches
        5
    """
    if not 0 <= rho < float("inf"):
        raise ValueError(f"rho must be finite and at least 0, got {rho}")
    with undisturbed(model):
        model = unwrapped(model)
        batches = read_batches(minibatches, freeze=freeze)
        names = parameter_names(model, list(direction))
        model_loss = make_model_loss(model, loss_fn)
        loss = PureLoss(model_loss, names, dtype=run_dtype(model, names, dtype))
        vector = _unit(loss, direction)
        totals = _Moments()
        whole = ModelOperator(model, loss_fn, batches, params=names, dtype=loss.dtype)
        pulled = whole.matmat(vector[None])[0]  # H v
        with ProgressBar(total=None, description="escape", unit="batch", enabled=progress) as bar:
            for number, batch in enumerate(batches):
                totals.add(_one(loss, loss.place(batch), number, vector, pulled, rho))
                bar.update()
    curvature = float(widened(vector) @ widened(pulled))
    return totals.report(curvature, rho)


def _unit(loss: PureLoss, direction: dict[str, Tensor]) -> Tensor:
    vector = widened(loss.join_by_name(direction))
    norm = float(vector.norm())
    if not 0 < norm < float("inf"):
        raise ValueError(f"the direction must have a finite norm above 0, got {norm}")
    return (vector / norm).to(loss.dtype)


def _one(
    loss: PureLoss, batch: Any, number: int, vector: Tensor, pulled: Tensor, rho: float
) -> dict[str, float]:
    """Return the components along v of the gradients of one minibatch's mean loss."""

    def mean_gradient(at: tuple[Tensor, ...]) -> Tensor:
        leaves = tuple(value.detach().requires_grad_() for value in at)
        return loss.join(loss.gradient(batch, leaves, differentiable=False)) / weight

    weight = float(loss(loss.leaves(), batch)[1])
    if not weight > 0:
        raise ValueError(f"minibatch {number} has weight {weight}; it must be positive")
    gradient = mean_gradient(loss.values)
    norm = float(widened(gradient).norm())

    def component(ascent: float) -> float:
        moved = tuple(
            value + ascent * piece
            for value, piece in zip(loss.values, loss.split(gradient), strict=True)
        )
        return float(widened(vector) @ widened(mean_gradient(moved)))

    # <v, H_z g> = <H_z v, g>: products with v instead of g, so that H v is computed once for all batches.
    own = widened(HessianGraph(loss, batch, number).product(vector[None])[0]) / weight
    along = float(widened(vector) @ widened(gradient))
    return {
        "sgd": along,
        "sam": component(rho),
        "sam_normalized": component(rho / norm) if norm > 0 else along,
        "expanded": along + rho * float(own @ widened(gradient)),
        "mixed": rho * float((own - widened(pulled)) @ widened(gradient)),
        "norm": norm,
    }


class _Moments:
    """Collects the components along v of all minibatches, and computes their moments."""

    def __init__(self) -> None:
        self._found: list[dict[str, float]] = []

    def add(self, components: dict[str, float]) -> None:
        self._found.append(components)

    def report(self, curvature: float, rho: float) -> EscapeReport:
        columns = {
            name: torch.tensor(
                [found[name] for found in self._found], dtype=torch.float64, device="cpu"
            )
            for name in self._found[0]
        }
        sgd, sam, normalized = columns["sgd"], columns["sam"], columns["sam_normalized"]
        second = {name: float(column.square().mean()) for name, column in columns.items()}
        if second["sgd"] == 0:
            raise ValueError(
                "no minibatch has a gradient along the direction, so its second moments are 0; pass "
                "another direction"
            )
        effective = torch.where(columns["norm"] > 0, rho / columns["norm"], 0)
        predicted = ((1 + effective * curvature).square() * sgd.square()).mean()
        scale = second["sam"] or float("nan")
        return EscapeReport(
            curvature=curvature,
            rho=rho,
            batches=len(self._found),
            sgd=second["sgd"],
            sam=second["sam"],
            sam_normalized=float(normalized.square().mean()),
            predicted_factor=(1 + rho * curvature) ** 2,
            factor=second["sam"] / second["sgd"],
            predicted_factor_normalized=float(predicted) / second["sgd"],
            factor_normalized=second["sam_normalized"] / second["sgd"],
            taylor_error=float((sam - columns["expanded"]).square().mean()) / scale,
            hessian_error=second["mixed"] / scale,
            mean_factor=float(sam.mean() / sgd.mean()),
            predicted_mean_factor=1 + rho * curvature,
            growth=curvature * (1 + rho * curvature),
        )
