"""The device scalars of a SAM launch, for PyTorch operations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastsam.kernels import extension


@dataclass(frozen=True)
class TorchScalars:
    """Scalars that a launch reads and writes; :class:`fastsam.kernels.sam.Scalars` lists shapes and dtypes.

    Attributes:
        grad_scale: loss scale by which the gradients are still multiplied; None for 1.
        skipped_steps: counter of skipped updates; None if another table counts them.
        unchanged: counter of elements that the perturbation did not change, or None.
    """

    hyper: Tensor
    complements: Tensor | None
    squared_norms: Tensor
    found_inf: Tensor
    grad_scale: Tensor | None
    skipped_steps: Tensor | None
    unchanged: Tensor | None

    def setting(self, name: str) -> Tensor:
        """Return a hyperparameter of all groups, ``[groups]``."""
        return setting(self.hyper, name)

    def complement(self, name: str) -> Tensor:
        """Return 1 minus a hyperparameter of all groups, ``[groups]``, without cancellation error."""
        if self.complements is None:
            return 1.0 - self.setting(name)
        return setting(self.complements, name)

    def loss_scale(self) -> Tensor | float:
        """Return the loss scale in the dtype of the hyperparameters, or 1."""
        return 1.0 if self.grad_scale is None else self.grad_scale.to(self.hyper.dtype)

    def gradient_factor(self) -> Tensor:
        """Return the factor of each group's gradients, ``[groups]``: 1, or -1 to maximize, over the scale."""
        sign = 1.0 - 2.0 * (self.setting("maximize") != 0).to(self.hyper.dtype)
        return sign / self.loss_scale()


def setting(block: Tensor, name: str) -> Tensor:
    """Return a column of a block of hyperparameters, ``[groups]``."""
    return block[:, extension.HYPER_COLUMNS.index(name)]
