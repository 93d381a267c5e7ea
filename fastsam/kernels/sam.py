"""The phases of a SAM step over many tensors at once: norm, perturb, check, restore, update.

A :class:`TensorTable` holds the addresses of the tensors of one dtype and device; the functions of this
module launch one native pass over it each. Nothing here synchronizes with the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fastsam.kernels import extension
from fastsam.kernels.alike import Alike

_EMPTY = 16
"""Address of the gradient of an empty tensor, which has no memory but is there; never read."""


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of ``tensor`` fill one run of memory without gaps or overlap, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


class TensorTable:
    """Addresses of the operands of a multi-tensor launch: one row per parameter of one dtype and device.

    Args:
        weights: the tensors to work on, all of one device and one of float32, float64, bfloat16, float16;
            dense in memory (any order of strides).
        groups: row of the block of hyper-parameters that belongs to each weight.
        adaptive: whether ASAM's normalization applies to each weight.
        stochastic: whether the ascent rounds each weight stochastically; None for none. It makes a
            difference to 16-bit weights only.

    Raises:
        ValueError: the weights do not share a device and a supported dtype, or one has gaps.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        groups: Sequence[int],
        adaptive: Sequence[bool],
        stochastic: Sequence[bool] | None = None,
    ) -> None:
        if not weights:
            raise ValueError("a table needs at least one tensor")
        self.device = weights[0].device
        self.dtype = weights[0].dtype
        if self.dtype not in extension.DTYPE_CODES:
            raise ValueError(
                f"fastsam has kernels for float32, float64, bfloat16 and float16, not for {self.dtype}"
            )
        for weight in weights:
            if weight.device != self.device or weight.dtype != self.dtype:
                raise ValueError("all weights of a table must share one device and one dtype")
            if not is_dense(weight):
                raise ValueError(
                    f"a weight of shape {tuple(weight.shape)} and strides {weight.stride()} has gaps "
                    "or overlaps; pass a contiguous copy"
                )
        self.weights = list(weights)
        self.count = len(weights)
        self.cells = array("q", bytes(8 * len(extension.TABLE_COLUMNS) * self.count))
        self._gradients: list[
            Tensor
        ] = []  # keeps re-laid-out copies alive until the launch is queued
        self._contiguous = [weight.is_contiguous() for weight in weights]
        self._shapes = [weight.shape for weight in weights]
        self._like_weights = Alike(weights)
        self._set("size", [weight.numel() for weight in weights])
        self._set("group", groups)
        stochastic = [False] * self.count if stochastic is None else stochastic
        self._set(
            "flags",
            [
                extension.ADAPTIVE * a + extension.STOCHASTIC * s
                for a, s in zip(adaptive, stochastic, strict=True)
            ],
        )
        self._set("weight", [weight.data_ptr() for weight in weights])

    def _set(self, column: str, values: Sequence[int]) -> None:
        start = extension.TABLE_COLUMNS.index(column) * self.count
        if len(values) != self.count:
            raise ValueError(f"{column} needs {self.count} entries, got {len(values)}")
        self.cells[start : start + self.count] = array("q", values)

    def column(self, name: str) -> array[int]:
        """A copy of one column, by the names of ``csrc/include/fastsam/table.h``."""
        start = extension.TABLE_COLUMNS.index(name) * self.count
        return self.cells[start : start + self.count]

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients of this pass; None where there is none.

        A gradient whose strides differ from its weight's is copied into the weight's layout.

        Raises:
            ValueError: a gradient is sparse, or of another device, dtype or shape than its weight. The
                table then still holds the gradients it had.
        """
        if self._like_weights.fits(gradients):
            present = cast("Sequence[Tensor]", gradients)
            addresses = list(map(Tensor.data_ptr, present))
            if 0 in addresses:
                addresses = [address or _EMPTY for address in addresses]
            self._gradients = []
            self._set("gradient", addresses)
            return
        addresses = []
        kept: list[Tensor] = []
        append = addresses.append
        dtype, device = self.dtype, self.device
        for weight, gradient, contiguous, shape in zip(
            self.weights, gradients, self._contiguous, self._shapes, strict=True
        ):
            if gradient is None:
                append(0)
                continue
            if (
                weight.shape != shape
            ):  # a gradient has its parameter's shape, the kernels go by this one
                raise ValueError(
                    f"a parameter of shape {tuple(shape)} became {tuple(weight.shape)} in the same memory "
                    "(p.data = p.data[...]); assign a copy, p.data = p.data[...].clone(), which is followed"
                )
            if (
                gradient.layout is not torch.strided
                or gradient.dtype is not dtype
                or gradient.device != device
                or gradient.shape != weight.shape
            ):
                raise ValueError(_describe_misfit(weight, gradient))
            if not (
                gradient.is_contiguous() if contiguous else gradient.stride() == weight.stride()
            ):
                gradient = torch.empty_like(
                    weight, memory_format=torch.preserve_format, requires_grad=False
                ).copy_(gradient.detach())
                kept.append(gradient)
            append(gradient.data_ptr() or _EMPTY)
        self._gradients = kept
        self._set("gradient", addresses)

    def set_backups(self, addresses: Sequence[int]) -> None:
        """Takes the addresses of the backups; a weight's own address where it was not perturbed."""
        self._set("backup", addresses)

    def set_state(self, slot: Literal[0, 1, 2], tensors: Sequence[Tensor | None]) -> None:
        """Takes one of the base optimizer's state tensors per weight, in the weight's layout; or None."""
        for weight, tensor in zip(self.weights, tensors, strict=True):
            if tensor is not None and (
                tensor.dtype != self.dtype
                or tensor.device != self.device
                or tensor.shape != weight.shape
                or (tensor.stride() != weight.stride() and tensor.numel())
            ):
                raise ValueError(
                    f"optimizer state of shape {tuple(tensor.shape)}, strides {tensor.stride()}, "
                    f"{tensor.dtype} on {tensor.device} does not match its weight: "
                    f"{tuple(weight.shape)}, {weight.stride()}, {weight.dtype} on {weight.device}"
                )
        self._set(
            f"state{slot}", [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        )

    def set_steps(self, counters: Sequence[Tensor] | None) -> None:
        """Takes the float32 scalars on the table's device that count the updates of each weight."""
        if counters is None:
            self._set("step", [0] * self.count)
            return
        for counter in counters:
            if counter.dtype != torch.float32 or counter.device != self.device:
                raise ValueError(
                    f"step counters must be float32 on {self.device}, "
                    f"got {counter.dtype} on {counter.device}"
                )
        self._set("step", [counter.data_ptr() for counter in counters])

    def set_noise(self, scales: Sequence[Tensor], streams: Sequence[int]) -> None:
        """Takes the standard deviations of noise and the stream that each weight draws from.

        Args:
            scales: float64 ``[rows]`` per weight, on its device; the weight's memory is cut into that
                many equal runs. One row is one deviation for all, ``weight.shape[0]`` rows one a filter.
            streams: number in [0, 2^32) of each weight's stream of random numbers.
        """
        for weight, scale in zip(self.weights, scales, strict=True):
            if scale.dtype != torch.float64 or scale.device != self.device or scale.dim() != 1:
                raise ValueError(
                    f"scales must be float64 [rows] on {self.device}, got {scale.dtype} "
                    f"{tuple(scale.shape)} on {scale.device}"
                )
            if scale.numel() == 0 or weight.numel() % scale.numel() != 0:
                raise ValueError(
                    f"{scale.numel()} standard deviations do not divide a weight of "
                    f"{weight.numel()} elements"
                )
        rows = [max(w.numel() // s.numel(), 1) for w, s in zip(self.weights, scales, strict=True)]
        self._set("scale", [scale.data_ptr() for scale in scales])
        self._set("row_size", rows)
        self._set("stream", streams)
        self._scales = list(scales)

    def scratch(self) -> Tensor:
        """Scratch memory for the launches over this table, zero-filled, to be kept and reused."""
        size = extension.backend(self.device).sam_scratch_bytes(self.cells)
        return torch.zeros(max(size, 16), dtype=torch.uint8, device=self.device)


def _describe_misfit(weight: Tensor, gradient: Tensor) -> str:
    if gradient.layout is not torch.strided:
        return (
            f"a gradient of shape {tuple(gradient.shape)} is sparse ({gradient.layout}); SAM needs dense "
            "gradients: build the embedding with sparse=False, or call p.grad = p.grad.to_dense()"
        )
    return (
        f"a gradient is {tuple(gradient.shape)} {gradient.dtype} on {gradient.device}, but its parameter "
        f"is {tuple(weight.shape)} {weight.dtype} on {weight.device}; they must agree: cast or move the "
        "gradient before the step"
    )


@dataclass(eq=False)
class Scalars:
    """What the phases share on one device.

    Attributes:
        hyper: float64 ``[groups, len(extension.HYPER_COLUMNS)]``.
        squared_norms: float64 ``[tables]``, one squared norm per table of the optimizer.
        found_inf: float32 ``[1]``, 1 when this step must be skipped.
        skipped_steps: int64 ``[1]``, counts skipped updates.
        unchanged: int64 ``[1]`` or None, counts elements that the perturbation could not change.
    """

    hyper: Tensor
    squared_norms: Tensor
    found_inf: Tensor
    skipped_steps: Tensor
    unchanged: Tensor | None = None

    def as_native(
        self,
        *,
        count_skip: bool = False,
        count_unchanged: bool = False,
        grad_scale: Tensor | None = None,
    ) -> Any:
        """The struct of addresses that a launch takes.

        Args:
            count_skip: count a skipped update; True for one table per device only.
            count_unchanged: count the elements of this table that the perturbation could not change.
            grad_scale: float32 scalar, the loss scale that the gradients still carry.
        """
        return extension.module().SamScalars(
            hyper=self.hyper.data_ptr(),
            group_count=self.hyper.shape[0],
            squared_norms=self.squared_norms.data_ptr(),
            norm_count=self.squared_norms.numel(),
            found_inf=self.found_inf.data_ptr(),
            grad_scale=_address(grad_scale),
            skipped_steps=self.skipped_steps.data_ptr() if count_skip else 0,
            unchanged=_address(self.unchanged) if count_unchanged else 0,
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def norm(table: TensorTable, hyper: Tensor, squared_norm: Tensor, scratch: Tensor) -> None:
    """``squared_norm[0]`` = sum of ``||T_w g||^2`` over the table, in float64 and a fixed order."""
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
    memory: the same bits on every device and for any number of threads.
    """
    extension.backend(table.device).sam_perturb(
        extension.execution(table.device), extension.DTYPE_CODES[table.dtype], table.cells, scalars
    )


def check(table: TensorTable, found_inf: Tensor) -> None:
    """Sets ``found_inf[0]`` to 1 where a gradient is inf or NaN, and leaves it alone otherwise."""
    extension.backend(table.device).sam_check(
        extension.execution(table.device),
        extension.DTYPE_CODES[table.dtype],
        table.cells,
        found_inf.data_ptr(),
    )


def restore(table: TensorTable) -> None:
    """Copies the backups into the weights, bit for bit."""
    extension.backend(table.device).sam_restore(
        extension.execution(table.device), extension.DTYPE_CODES[table.dtype], table.cells
    )


def update(
    table: TensorTable, scalars: Any, scratch: Tensor, *, rule: Literal["sgd", "adam"]
) -> None:
    """Restores and updates in one pass; restores only where there is no gradient or a flag says skip."""
    getattr(extension.backend(table.device), f"sam_update_{rule}")(
        extension.execution(table.device),
        extension.DTYPE_CODES[table.dtype],
        table.cells,
        scalars,
        scratch.data_ptr(),
    )
