"""The public operator of a model's curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.operators.algebra import CallableOperator, SymmetricOperator
from fastsam.curvature.operators.model import ModelOperator
from fastsam.curvature.products.selection import selected_names


class CurvatureOperator(SymmetricOperator):
    """The curvature of a model's mean loss, made by :func:`fastsam.curvature_operator`.

    It belongs to the weights that the model had then: later changes in place, such as optimizer steps,
    do not change it. If a parameter, buffer or module is replaced, for example by
    ``load_state_dict(assign=True)``, products that evaluate the model again raise ValueError.

    Every product runs in evaluation mode with exact arithmetic (no TF32, no autocast) and restores
    the model's modes and the random state.

    Attributes:
        loss: mean loss.
        weight: sum of the loss weights; the number of samples if the loss is unweighted.
        gradient: gradient of the mean loss, ``[n]``.
        weight_norm: 2-norm of the chosen parameters.
        kind: name of the curvature matrix.
        names: names of the chosen parameters, in the order of their coordinates.
    """

    def __init__(self, operator: ModelOperator, model: nn.Module) -> None:
        self._operator = operator
        self._model = model
        self.loss = operator.loss
        self.weight = operator.weight
        self.gradient = operator.gradient
        self.weight_norm = operator.weight_norm
        self.kind = operator.kind.name
        self.names = operator.names

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``, where n is the number of chosen parameters."""
        return self._operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._operator.device

    @property
    def identity(self) -> dict[str, Any]:
        """Properties that determine the bits of the products, for checkpoints."""
        return self._operator.identity

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of ``vectors``, ``[count, n]``, as rows."""
        with undisturbed(self._model):
            return self._operator.matmat(vectors)

    # Type checkers forbid more types than in the base class, because of reflected operators, which
    # tensors and mappings lack.
    @overload  # type: ignore[override]
    def __matmul__(self, vectors: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def __matmul__(self, vectors: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Multiply a vector ``[n]``, columns ``[n, k]``, or a dict of tensors by parameter name."""
        if isinstance(vectors, Mapping):
            return self.split(self.matmat(self.join(vectors)[None])[0])
        return super().__matmul__(vectors)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector ``[n]`` into tensors of the parameters' shapes, by their names."""
        return self._operator.split(vector)

    def join(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Join tensors of the parameters' shapes to a vector ``[n]``, the inverse of :meth:`split`.

        Raises:
            ValueError: a name is missing or unknown, or a shape is wrong.
        """
        return self._operator.join(pieces)

    def block_of(self, *params: str) -> CallableOperator:
        """Return the diagonal block of some parameters or layers, given by name.

        Each product costs as much as one with the whole operator. An operator that is made with
        ``params=`` computes the same block without the other parameters' gradients.

        Raises:
            ValueError: a name is unknown.
        """
        chosen = set(selected_names(self.names, params))
        positions, offset = [], 0
        for name, size in zip(self.names, self._operator.sizes, strict=True):
            if name in chosen:
                positions.append(torch.arange(offset, offset + size, device=self.device))
            offset += size
        return self.block(torch.cat(positions))

    def __repr__(self) -> str:
        return (
            f"CurvatureOperator(kind={self.kind!r}, shape={self.shape}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, device={str(self.device)!r})"
        )
