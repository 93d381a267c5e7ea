"""Symmetric linear operators: the protocol, and operators from matrices and callables."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map of R^n, defined by its products.

    ``matmat`` maps the rows of a block ``[probes, n]`` to the rows of a new block of the same shape,
    dtype and device. It must not change its argument.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors: float32 or float64."""

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of ``vectors``, ``[probes, n]``, as rows."""


class AsymmetryError(ValueError):
    """Raised if the products of an operator show that it is not symmetric.

    Attributes:
        asymmetry: the largest difference of ``u'(Av)`` and ``v'(Au)`` relative to the norm.
    """

    def __init__(self, asymmetry: float) -> None:
        super().__init__(
            f"the operator is not symmetric: u'(Av) and v'(Au) differ by {asymmetry:.1e} of its "
            "norm, so its Ritz values would be meaningless. Check whether its products change from "
            "call to call; for a model, check for an operation whose second derivative is wrong, "
            "such as torch's weight_norm"
        )
        self.asymmetry = asymmetry


class ResolutionError(ValueError):
    """Raised if the curvature is so small that rounding dominates the products."""


def checked_product(images: Tensor, vectors: Tensor) -> Tensor:
    """Return ``images``, detached, after checking their shape and dtype.

    Raises:
        ValueError: the shape or dtype differs from that of ``vectors``.
    """
    if images.shape != vectors.shape or images.dtype != vectors.dtype:
        raise ValueError(
            f"the operator's product is {images.dtype} {tuple(images.shape)} for vectors "
            f"{vectors.dtype} {tuple(vectors.shape)}; it must have the same shape and dtype"
        )
    return images.detach()
