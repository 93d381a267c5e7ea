"""Perturbations in a ball around the weights, and projected gradient ascent in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.curvature.mean_loss import MeanLoss
from fastsam.kernels.backends import widened


@dataclass(frozen=True, eq=False)
class Place:
    """A perturbation u ``[n]``, with the loss and its gradient ``[n]`` by the perturbed weights."""

    u: Tensor
    loss: float
    gradient: Tensor


class Neighborhood:
    """Perturbations ``T u`` of the weights with ``||u|| <= rho``.

    Args:
        mean: the loss, whose origin is the weights.
        rho: radius.
        adaptive: whether T is the diagonal matrix of the absolute weights instead of the identity.

    Attributes:
        scale: diagonal of T, ``[n]``.

    Raises:
        ValueError: T is zero.
    """

    def __init__(self, mean: MeanLoss, rho: float, *, adaptive: bool) -> None:
        self._mean = mean
        self._rho = rho
        self.scale = mean.origin.abs() if adaptive else torch.ones_like(mean.origin)
        if not bool(self.scale.any()):
            raise ValueError(
                "adaptive=True scales perturbations by the absolute weights, but all chosen "
                "parameters are zero; pass adaptive=False"
            )

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the unit vector u of steepest ascent for a gradient by the weights, or zeros."""
        return _unit(self.scale * gradient)

    def gaussian(self, generator: torch.Generator) -> Tensor:
        """Return a standard Gaussian vector, drawn in float64 on the CPU."""
        drawn = torch.randn(len(self.scale), dtype=torch.float64, generator=generator, device="cpu")
        return drawn.to(self.scale.dtype).to(self.scale.device)

    def random_direction(self, generator: torch.Generator) -> Tensor:
        """Return a random unit vector; coordinates that do not move the weights are zero."""
        return _unit((self.scale != 0) * self.gaussian(generator))

    def loss_at(self, u: Tensor, mean: MeanLoss) -> float:
        """Return a mean loss at the weights perturbed by ``T u``.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        return finite_loss(mean.at(self._moved(u))[0], self._where)

    def place(self, u: Tensor) -> Place:
        """Compute the loss and its gradient at the weights perturbed by ``T u``.

        Raises:
            FloatingPointError: the loss or the gradient is not finite.
        """
        loss, gradient = self._mean.with_gradient(self._moved(u))
        return Place(u, finite_loss(loss, self._where), finite_gradient(gradient))

    def ascend(self, start: Place, steps: int) -> Iterator[Place]:
        """Yield the places that projected gradient ascent tries, accepted or not.

        A step has length rho. One that does not increase the loss is undone and halves the length.
        """
        here, length = start, self._rho
        for _ in range(steps):
            tried = self.place(self._projected(here.u + length * self.steepest(here.gradient)))
            yield tried
            if tried.loss > here.loss:
                here = tried
            else:
                length /= 2

    @property
    def _where(self) -> str:
        return f"at weights within rho={self._rho}"

    def _moved(self, u: Tensor) -> Tensor:
        return self._mean.origin + self.scale * u

    def _projected(self, u: Tensor) -> Tensor:
        norm = float(widened(u).norm())
        return u if norm <= self._rho else u * (self._rho / norm)


def finite_loss(loss: float, where: str) -> float:
    """Return a loss; raise FloatingPointError if it is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss {where} is {loss}, so the sharpness is undefined; check the data and the "
            "weights, or lower rho"
        )
    return loss


def finite_gradient(gradient: Tensor) -> Tensor:
    """Return a gradient; raise FloatingPointError if it is not finite."""
    if not bool(torch.isfinite(gradient).all()):
        raise FloatingPointError(
            "a gradient contains NaN or infinity, so the sharpness is undefined; check the data and "
            "the weights, or lower rho"
        )
    return gradient


def _unit(vector: Tensor) -> Tensor:
    """Return a vector divided by its norm; zeros for a zero vector."""
    norm = float(widened(vector).norm())
    return vector if norm == 0 else (widened(vector) / norm).to(vector.dtype)
