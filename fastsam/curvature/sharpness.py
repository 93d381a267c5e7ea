"""Sharpness: the increase of the loss in a neighborhood of the weights.

All three measures perturb the weights by ``T u``. T is the identity, or for ``adaptive=True`` the
diagonal matrix of the absolute weights, so that rescaling two consecutive layers of a ReLU network
does not change the measure (Kwon et al., "ASAM", ICML 2021, arXiv 2102.11600). The worst case is over
``||u|| <= rho``; the average is over Gaussian u with ``E ||u||^2 = rho^2``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsam.curvature.checks import check_count, check_number
from fastsam.curvature.data import Batches, one_batch, read_batches
from fastsam.curvature.estimates import check_confidence
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss
from fastsam.curvature.mean_loss import MeanLoss
from fastsam.curvature.neighborhood import Neighborhood, finite_gradient, finite_loss
from fastsam.curvature.products.passes import pieces, splittable
from fastsam.curvature.student import student_quantile
from fastsam.progress import ProgressBar

Measure = Literal["m", "worst-case", "average"]


@dataclass(frozen=True, eq=False)
class Sharpness:
    """The increase of the mean loss in a neighborhood of the weights.

    Attributes:
        measure: ``"m"``, ``"worst-case"`` or ``"average"``.
        value: the increase.
        loss: mean loss at the weights.
        rho: radius of the neighborhood.
        adaptive: whether coordinates are scaled by the absolute weights.
        increases: one increase per chunk for ``"m"``, per ascent step for ``"worst-case"`` (those of
            all ascents), per pair of opposite perturbations for ``"average"``.
        stderr: standard error of ``value`` over the pairs of perturbations; None for other measures.
        perturbation: the perturbation that attains ``value``, by parameter name, for
            ``"worst-case"``; None for other measures.
    """

    measure: Measure
    value: float
    loss: float
    rho: float
    adaptive: bool
    increases: tuple[float, ...]
    stderr: float | None = None
    perturbation: dict[str, Tensor] | None = None

    @property
    def is_lower_bound(self) -> bool:
        """Whether ``value`` is a lower bound of a maximum, found by ascent."""
        return self.measure != "average"

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return Student's t interval of an average.

        Raises:
            ValueError: the measure is no average, or ``confidence`` is not between 0 and 1.
        """
        check_confidence(confidence)
        if self.stderr is None:
            raise ValueError(
                f"a sharpness of measure {self.measure!r} has no standard error; only that of "
                "average_sharpness is an estimate"
            )
        half = student_quantile(confidence, len(self.increases) - 1) * self.stderr
        return self.value - half, self.value + half


def m_sharpness(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    *,
    rho: float,
    m: int | None,
    adaptive: bool = False,
    params: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    freeze: int | None = None,
    progress: bool = True,
) -> Sharpness:
    """Compute the mean over chunks of m samples of ``L(w + rho g / ||g||) - L(w)``.

    L is the mean loss of the chunk and g its gradient at w, so the perturbation is that of a SAM step
    on the chunk. Foret et al. (ICLR 2021, arXiv 2010.01412); Andriushchenko and
    Flammarion, "Towards Understanding Sharpness-Aware Minimization" (ICML 2022, arXiv 2206.06232). With
    ``adaptive``, the perturbation is ``rho T^2 g / ||T g||``, T the diagonal matrix of the absolute
    weights. A chunk whose gradient is zero counts with increase 0. Chunks are weighted by the sum of
    their loss weights, so that ``loss`` is the mean loss over all data.

    The model runs in evaluation mode. Its weights, buffers, gradients and modes, and the global random
    state, do not change.

    Args:
        model: as in :func:`fastsam.spectral_density`.
        loss_fn: as in :func:`fastsam.spectral_density`.
        data: as in :func:`fastsam.spectral_density`.
        rho: length of the perturbation, above 0.
        m: samples per chunk. Every batch is split into consecutive chunks, the last of which may be
            smaller. None uses the batches as chunks, as a :class:`BatchLoss` requires.
        adaptive: whether to scale the perturbation by the absolute weights. Default False.
        params: names of parameters or layers to perturb. Default None: all that require a gradient.
        dtype: dtype of weights and data, torch.float32 or torch.float64. Default None: that of the
            parameters, at least float32. Use float64 if the value is below about 1e-6 times the loss.
        freeze: as in :class:`fastsam.curvature.SpectrumOptions`.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        TypeError, ValueError: an argument is invalid, or the loss is random.
        FloatingPointError: a loss or gradient is not finite.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> found = m_sharpness(model, nn.CrossEntropyLoss(), batch, rho=0.1, m=4)
        >>> found.value > 0, len(found.increases)
        (True, 2)
    """
    _check_rho(rho)
    if m is not None:
        check_count("m", m, unit="samples")
    increases: list[float] = []
    losses: list[float] = []
    weights: list[float] = []
    with undisturbed(model):
        batches = read_batches(data, freeze=freeze)
        mean = MeanLoss(model, loss_fn, batches, params=params, dtype=dtype)
        if m is not None:
            batches = _chunks(mean, m)
        neighborhood = Neighborhood(mean, rho, adaptive=adaptive)
        with ProgressBar(
            total=None, description="m-sharpness", unit="chunk", enabled=progress
        ) as bar:
            for chunk in batches:
                part = mean.over(one_batch(chunk))
                total, weight, gradient = part.sums_with_gradient(mean.origin)
                if weight > 0:  # all targets of a chunk may be ignored
                    step = rho * neighborhood.steepest(finite_gradient(gradient))
                    losses.append(finite_loss(total / weight, "at the weights"))
                    increases.append(neighborhood.loss_at(step, part) - losses[-1])
                    weights.append(weight)
                bar.update()
    if not weights:
        raise ValueError(
            "no chunk has a positive weight: check whether the data are empty or every target is "
            "ignored"
        )
    value, loss = (
        math.fsum(map(operator.mul, weights, each)) / math.fsum(weights)
        for each in (increases, losses)
    )
    return Sharpness("m", value, loss, rho, adaptive, tuple(increases))


def worst_case_sharpness(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    *,
    rho: float,
    adaptive: bool = False,
    steps: int = 20,
    restarts: int = 0,
    seed: int = 0,
    params: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    freeze: int | None = None,
    progress: bool = True,
) -> Sharpness:
    """Bound the largest increase of the mean loss over ``||u|| <= rho`` from below.

    Projected gradient ascent in u, with normalized steps: the first has length rho, and a step that
    does not increase the loss is undone and halves the length. So the value is at least that of one
    SAM step on the whole data, and grows with ``steps``. It is a lower bound of the maximum, because
    the ascent may end at a local one. Adaptive worst case: Andriushchenko et al., "A Modern Look at the
    Relationship between Sharpness and Generalization" (ICML 2023, arXiv 2302.07011), which uses
    Auto-PGD instead.

    Args:
        model: as in :func:`m_sharpness`.
        loss_fn: as in :func:`m_sharpness`.
        data: as in :func:`m_sharpness`; the loss is the mean over all of it.
        rho: radius, above 0.
        adaptive: whether the perturbation is ``|w| u`` by element instead of u. Default False.
        steps: steps per ascent, each with one gradient. Default 20, as in the code of arXiv
            2302.07011.
        restarts: additional ascents, each from a random point of length rho. Default 0. If the
            gradient at the weights is zero, the first ascent starts there, too.
        seed: seed of random starting points.
        params: as in :func:`m_sharpness`.
        dtype: as in :func:`m_sharpness`.
        freeze: as in :func:`m_sharpness`.
        progress: as in :func:`m_sharpness`.

    Raises:
        TypeError, ValueError: an argument is invalid, or the loss is random.
        FloatingPointError: a loss or gradient is not finite.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> found = worst_case_sharpness(model, nn.CrossEntropyLoss(), batch, rho=0.1)
        >>> found.is_lower_bound, sorted(found.perturbation)
        (True, ['bias', 'weight'])
    """
    _check_rho(rho)
    check_count("steps", steps)
    check_count("restarts", restarts, least=0)
    with undisturbed(model):
        batches = read_batches(data, freeze=freeze)
        mean = MeanLoss(model, loss_fn, batches, params=params, dtype=dtype)
        neighborhood = Neighborhood(mean, rho, adaptive=adaptive)
        generator = torch.Generator().manual_seed(seed)
        origin = neighborhood.place(torch.zeros_like(mean.origin))
        best = origin
        increases: list[float] = []
        total = (1 + restarts) * steps
        with ProgressBar(total=total, description="ascent", enabled=progress) as bar:
            for ascent in range(1 + restarts):
                start = origin
                if ascent > 0 or not bool(neighborhood.steepest(origin.gradient).any()):
                    start = neighborhood.place(rho * neighborhood.random_direction(generator))
                best = max(best, start, key=lambda found: found.loss)
                for place in neighborhood.ascend(start, steps):
                    increases.append(place.loss - origin.loss)
                    best = max(best, place, key=lambda found: found.loss)
                    bar.update()
        perturbation = mean.loss.split_by_name(neighborhood.scale * best.u)
    return Sharpness(
        "worst-case",
        best.loss - origin.loss,
        origin.loss,
        rho,
        adaptive,
        tuple(increases),
        perturbation=perturbation,
    )


def average_sharpness(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    *,
    rho: float,
    samples: int = 20,
    adaptive: bool = False,
    seed: int = 0,
    params: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    freeze: int | None = None,
    progress: bool = True,
) -> Sharpness:
    """Estimate the mean increase of the mean loss under Gaussian perturbations of the weights.

    The coordinates of u are independent with standard deviation ``rho / sqrt(n)``, where n is the
    number of perturbed parameters, so that ``E ||u||^2 = rho^2``. On a quadratic loss with Hessian H
    the mean increase is ``rho^2 / (2 n) trace(T H T)``. arXiv 2302.07011 uses the standard deviation rho
    for every coordinate: pass ``rho * sqrt(n)`` for that form. Each sample is the mean over u and -u,
    which removes the contribution of the gradient.

    Args:
        model: as in :func:`m_sharpness`.
        loss_fn: as in :func:`m_sharpness`.
        data: as in :func:`m_sharpness`; the loss is the mean over all of it.
        rho: root mean square length of u, above 0.
        samples: number of pairs of opposite perturbations, at least 2. Default 20.
        adaptive: whether the perturbation is ``|w| u`` by element instead of u. Default False.
        seed: seed of the perturbations, which are drawn in float64 on the CPU.
        params: as in :func:`m_sharpness`.
        dtype: as in :func:`m_sharpness`.
        freeze: as in :func:`m_sharpness`.
        progress: as in :func:`m_sharpness`.

    Raises:
        TypeError, ValueError: an argument is invalid, or the loss is random.
        FloatingPointError: a loss is not finite.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> found = average_sharpness(model, nn.CrossEntropyLoss(), batch, rho=0.1)
        >>> found.value > 0, found.stderr < found.value
        (True, True)
    """
    _check_rho(rho)
    check_count("samples", samples, least=2)
    with undisturbed(model):
        batches = read_batches(data, freeze=freeze)
        mean = MeanLoss(model, loss_fn, batches, params=params, dtype=dtype)
        neighborhood = Neighborhood(mean, rho, adaptive=adaptive)
        generator = torch.Generator().manual_seed(seed)
        loss = finite_loss(mean.at(mean.origin)[0], "at the weights")
        deviation = rho / math.sqrt(len(mean.origin))
        increases = []
        with ProgressBar(
            total=samples, description="average sharpness", unit="pair", enabled=progress
        ) as bar:
            for _ in range(samples):
                u = deviation * neighborhood.gaussian(generator)
                pair = neighborhood.loss_at(u, mean) + neighborhood.loss_at(-u, mean)
                increases.append(pair / 2 - loss)
                bar.update()
    drawn = torch.tensor(increases, dtype=torch.float64, device="cpu")
    return Sharpness(
        "average",
        float(drawn.mean()),
        loss,
        rho,
        adaptive,
        tuple(increases),
        stderr=float(drawn.std()) / math.sqrt(samples),
    )


def _check_rho(rho: float) -> None:
    check_number("rho", rho, below=math.inf)
    if not rho > 0:
        raise ValueError(f"rho must be above 0, got {rho}")


def _chunks(mean: MeanLoss, m: int) -> Batches:
    """Split every batch into chunks of at most m samples.

    Raises:
        ValueError: the loss is a :class:`BatchLoss`, or the tensors of a batch have different lengths.
    """
    if not mean.loss.model_loss.separable:
        raise ValueError(
            "m requires a criterion, because the batches of a BatchLoss cannot be split; pass "
            "m=None and batches of m samples"
        )
    return pieces(splittable(mean.batches, "m requires; pass m=None and batches of m samples"), m)
