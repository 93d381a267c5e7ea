"""The phases of a SAM step over many tensors at once: norm, perturb, check, restore, update.

Each function is one native launch over a :class:`fastsam.kernels.table.TensorTable`, or the same computation
in PyTorch operations if the device has no kernels. None of them makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastsam.kernels import extension
from fastsam.kernels.backends import backend_of
from fastsam.kernels.copies import need_not_wait
from fastsam.kernels.table import TensorTable
from fastsam.kernels.torch_ops import sam as torch_sam
from fastsam.kernels.torch_ops import updates as torch_updates
from fastsam.kernels.torch_ops.scalars import TorchScalars


@dataclass(eq=False)
class Scalars:
    """Device scalars that the phases of a step share.

    Floating-point scalars are float64 with native kernels. With PyTorch operations they are float32 unless a
    table has float64 weights; see :func:`fastsam.kernels.backends.sum_dtype`.

    Attributes:
        hyper: hyperparameters, ``[groups, len(extension.HYPER_COLUMNS)]``.
        squared_norms: ``[tables]``, one squared norm per table of the optimizer.
        found_inf: float32 ``[1]``, 1 if this step must be skipped.
        skipped_steps: int64 ``[1]``, number of skipped updates.
        unchanged: int64 ``[1]`` or None, number of elements that the perturbation did not change.
        complements: ``1 - hyper``, computed in float64 and then rounded to float32, in which the subtraction
            1 - 0.999 would leave only five digits. None if ``hyper`` is float64.
    """

    hyper: Tensor
    squared_norms: Tensor
    found_inf: Tensor
    skipped_steps: Tensor
    unchanged: Tensor | None = None
    complements: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        *,
        groups: int,
        tables: int,
        dtype: torch.dtype,
        device: torch.device,
        skipped_steps: Tensor,
        unchanged: Tensor | None = None,
    ) -> Scalars:
        """Return scalars initialized to 0, with the given counters."""
        shape = (groups, len(extension.HYPER_COLUMNS))
        rounded = dtype != torch.float64
        return cls(
            hyper=torch.zeros(shape, dtype=dtype, device=device),
            squared_norms=torch.zeros(tables, dtype=dtype, device=device),
            found_inf=torch.zeros(1, dtype=torch.float32, device=device),
            skipped_steps=skipped_steps,
            unchanged=unchanged,
            complements=torch.zeros(shape, dtype=dtype, device=device) if rounded else None,
        )

    def write_hyper(self, rows: Sequence[Sequence[float]]) -> None:
        """Write the hyperparameters of all groups. The copy to a GPU is asynchronous."""
        values = np.array(rows, dtype=np.float64)
        _send(values, self.hyper)
        if self.complements is not None:
            _send(1.0 - values, self.complements)

    def write_setting(self, group: int, column: int, value: Tensor) -> None:
        """Write one hyperparameter from a tensor of one element on a device."""
        value = value.reshape(())
        non_blocking = need_not_wait(self.hyper.device)
        self.hyper[group, column].copy_(value, non_blocking=non_blocking)
        if self.complements is not None:
            self.complements[group, column].copy_(1.0 - value, non_blocking=non_blocking)

    def arguments(
        self,
        *,
        count_skip: bool = False,
        count_unchanged: bool = False,
        grad_scale: Tensor | None = None,
    ) -> Any:
        """Return the scalars as the argument of a launch: a struct of addresses, or tensors for PyTorch.

        Args:
            count_skip: count a skipped update. Set it for exactly one table per device.
            count_unchanged: count the elements of this table that the perturbation does not change.
            grad_scale: float32 scalar, the loss scale by which the gradients are still multiplied.
        """
        skipped_steps = self.skipped_steps if count_skip else None
        unchanged = self.unchanged if count_unchanged else None
        if backend_of(self.hyper.device) == "torch":
            return TorchScalars(
                hyper=self.hyper,
                complements=self.complements,
                squared_norms=self.squared_norms,
                found_inf=self.found_inf,
                grad_scale=grad_scale,
                skipped_steps=skipped_steps,
                unchanged=unchanged,
            )
        return extension.module().SamScalars(
            hyper=self.hyper.data_ptr(),
            group_count=self.hyper.shape[0],
            squared_norms=self.squared_norms.data_ptr(),
            norm_count=self.squared_norms.numel(),
            found_inf=self.found_inf.data_ptr(),
            grad_scale=_address(grad_scale),
            skipped_steps=_address(skipped_steps),
            unchanged=_address(unchanged),
        )


def _send(values: np.ndarray, block: Tensor) -> None:
    """Copy float64 values from the host to ``block``, rounded to its dtype."""
    new = torch.from_numpy(values if block.dtype == torch.float64 else values.astype(np.float32))
    if need_not_wait(block.device):
        block.copy_(new.pin_memory(), non_blocking=True)
    else:
        block.copy_(new)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def norm(table: TensorTable, hyper: Tensor, squared_norm: Tensor, scratch: Tensor) -> None:
    """Write the sum of ``||T_w g||^2`` over the table to ``squared_norm[0]``.

    Native kernels add in float64 and in a fixed order, PyTorch operations in ``table.sum_dtype``.
    """
    if table.backend == "torch":
        torch_sam.norm(table, hyper, squared_norm)
        return
    extension.backend(table.device).sam_norm(
        extension.execution(table.device),
        extension.DTYPE_CODES[table.dtype],
        table.cells,
        hyper.data_ptr(),
        squared_norm.data_ptr(),
        scratch.data_ptr(),
    )


def perturb(table: TensorTable, scalars: Any) -> None:
    """Back up the weights, perturb them, ``w += T_w^2 g rho / (norm + 1e-12)``, and set ``found_inf``.

    The random bits of stochastic rounding are a function of the bits of the squared norm, the row in the
    table and the offset in memory. Given an equal norm, they are equal on every device and for any number of
    threads.
    """
    if table.backend == "torch":
        torch_sam.perturb(table, scalars)
        return
    extension.backend(table.device).sam_perturb(
        extension.execution(table.device), extension.DTYPE_CODES[table.dtype], table.cells, scalars
    )


def check(table: TensorTable, found_inf: Tensor) -> None:
    """Set ``found_inf[0]`` to 1 if a gradient is inf or NaN; otherwise leave it unchanged."""
    if table.backend == "torch":
        torch_sam.check(table, found_inf)
        return
    extension.backend(table.device).sam_check(
        extension.execution(table.device),
        extension.DTYPE_CODES[table.dtype],
        table.cells,
        found_inf.data_ptr(),
    )


def restore(table: TensorTable) -> None:
    """Copy the backups into the weights, bit for bit."""
    if table.backend == "torch":
        torch_sam.restore(table)
        return
    extension.backend(table.device).sam_restore(
        extension.execution(table.device), extension.DTYPE_CODES[table.dtype], table.cells
    )


def update(
    table: TensorTable, scalars: Any, scratch: Tensor, *, rule: Literal["sgd", "adam"]
) -> None:
    """Restore and update the weights in one pass; only restore without a gradient or if ``found_inf`` is set.

    Args:
        table: the weights, with gradients, backups and the base optimizer's state.
        scalars: result of :meth:`Scalars.arguments`.
        scratch: result of :meth:`fastsam.kernels.table.TensorTable.scratch`.
        rule: base optimizer, ``"sgd"`` or ``"adam"`` (Adam and AdamW).
    """
    if table.backend == "torch":
        torch_updates.update(table, scalars, rule=rule)
        return
    getattr(extension.backend(table.device), f"sam_update_{rule}")(
        extension.execution(table.device),
        extension.DTYPE_CODES[table.dtype],
        table.cells,
        scalars,
        scratch.data_ptr(),
    )
