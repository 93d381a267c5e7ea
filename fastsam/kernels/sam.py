"""The phases of a SAM step over many tensors at once: norm, perturb, check, restore, update.

Each function is one native launch over a :class:`fastsam.kernels.table.TensorTable`, or its twin in PyTorch
operations where the device has no kernels. Nothing here synchronizes with the device.
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
from fastsam.kernels.table import TensorTable
from fastsam.kernels.torch_ops import sam as torch_sam
from fastsam.kernels.torch_ops import updates as torch_updates
from fastsam.kernels.torch_ops.scalars import TorchScalars


@dataclass(eq=False)
class Scalars:
    """What the phases share on one device.

    Numbers with fractions are float64 with native kernels; with PyTorch operations they are float32 unless a
    table has float64 weights, see :func:`fastsam.kernels.backends.sum_dtype`.

    Attributes:
        hyper: ``[groups, len(extension.HYPER_COLUMNS)]``.
        squared_norms: ``[tables]``, one squared norm per table of the optimizer.
        found_inf: float32 ``[1]``, 1 when this step must be skipped.
        skipped_steps: int64 ``[1]``, counts skipped updates.
        unchanged: int64 ``[1]`` or None, counts elements that the perturbation could not change.
        complements: ``1 - hyper``, computed in float64 before it was rounded: 1 - 0.999 has five digits in
            float32. None where ``hyper`` is float64.
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
        """Return scalars that are 0, for a number of groups and tables, around given counters."""
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
        """Write the hyper-parameters of all groups, without waiting for a GPU."""
        values = np.array(rows, dtype=np.float64)
        _send(values, self.hyper)
        if self.complements is not None:
            _send(1.0 - values, self.complements)

    def write_setting(self, group: int, column: int, value: Tensor) -> None:
        """Write one hyper-parameter that is a scalar tensor on a device."""
        wait_not = value.device.type == "cuda"
        self.hyper[group, column].copy_(value, non_blocking=wait_not)
        if self.complements is not None:
            self.complements[group, column].copy_(1.0 - value, non_blocking=wait_not)

    def arguments(
        self,
        *,
        count_skip: bool = False,
        count_unchanged: bool = False,
        grad_scale: Tensor | None = None,
    ) -> Any:
        """Return what a launch takes: a struct of addresses, or the tensors for PyTorch operations.

        Args:
            count_skip: count a skipped update; True for one table per device only.
            count_unchanged: count the elements of this table that the perturbation could not change.
            grad_scale: float32 scalar, the loss scale that the gradients still carry.
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
    """Copy float64 numbers of the host into ``block``, rounded to its dtype there."""
    new = torch.from_numpy(values if block.dtype == torch.float64 else values.astype(np.float32))
    if block.device.type == "cuda":
        block.copy_(new.pin_memory(), non_blocking=True)
    else:
        block.copy_(new)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def norm(table: TensorTable, hyper: Tensor, squared_norm: Tensor, scratch: Tensor) -> None:
    """``squared_norm[0]`` = sum of ``||T_w g||^2`` over the table.

    Native kernels add in float64 and a fixed order, PyTorch operations in ``table.sum_dtype``.
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
    """Backs the weights up and climbs: ``w += T_w^2 g rho / (norm + 1e-12)``; sets ``found_inf``.

    Stochastic rounding draws from the bits of the squared norm, the row in the table and the place in
    memory: the same bits on every device and for any number of threads, where the norm has the same bits.
    """
    if table.backend == "torch":
        torch_sam.perturb(table, scalars)
        return
    extension.backend(table.device).sam_perturb(
        extension.execution(table.device), extension.DTYPE_CODES[table.dtype], table.cells, scalars
    )


def check(table: TensorTable, found_inf: Tensor) -> None:
    """Sets ``found_inf[0]`` to 1 where a gradient is inf or NaN, and leaves it alone otherwise."""
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
    """Copies the backups into the weights, bit for bit."""
    if table.backend == "torch":
        torch_sam.restore(table)
        return
    extension.backend(table.device).sam_restore(
        extension.execution(table.device), extension.DTYPE_CODES[table.dtype], table.cells
    )


def update(
    table: TensorTable, scalars: Any, scratch: Tensor, *, rule: Literal["sgd", "adam"]
) -> None:
    """Restores and updates in one pass; restores only where there is no gradient or a flag says skip."""
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
