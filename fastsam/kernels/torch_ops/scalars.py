"""The device scalars of a SAM launch, for PyTorch operations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastsam.kernels import extension


@dataclass(frozen=True)
class TorchScalars:
    """What a launch reads and writes; see :class:`fastsam.kernels.sam.Scalars` for shapes and dtypes.

    Attributes:
        grad_scale: the loss scale that the gradients still carry, or None for 1.
        skipped_steps: counts skipped updates, or None where another table counts them.
        unchanged: counts elements that the perturbation could not change, or None.
    """

    hyper: Tensor
    complements: Tensor | None
    squared_norms: Tensor
    found_inf: Tensor
    grad_scale: Tensor | None
    skipped_steps: Tensor | None
    unchanged: Tensor | None

    def setting(self, name: str) -> Tensor:
        """Return a hyper-parameter of all groups, ``[groups]``."""
        return setting(self.hyper, name)

    def complement(self, name: str) -> Tensor:
        """Return 1 minus a hyper-parameter of all groups, ``[groups]``, to the last digit."""
        if self.complements is None:
            return 1.0 - self.setting(name)
        return setting(self.complements, name)

    def loss_scale(self) -> Tensor | float:
        """Return the loss scale in the dtype of the hyper-parameters, or 1."""
        return 1.0 if self.grad_scale is None else self.grad_scale.to(self.hyper.dtype)

    def gradient_factor(self) -> Tensor:
        """Return what gradients of each group are multiplied with, ``[groups]``: -1 or 1 over the scale."""
        sign = 1.0 - 2.0 * (self.setting("maximize") != 0).to(self.hyper.dtype)
        return sign / self.loss_scale()


def setting(block: Tensor, name: str) -> Tensor:
    """Return a column of a block of hyper-parameters, ``[groups]``."""
    return block[:, extension.HYPER_COLUMNS.index(name)]
