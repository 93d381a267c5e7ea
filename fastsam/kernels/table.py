"""The operands of a multi-tensor launch: one row per parameter of one dtype and device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from fastsam.kernels import extension
from fastsam.kernels.alike import Alike
from fastsam.kernels.backends import Backend, backend_of, sum_dtype

_EMPTY = 16
"""Placeholder address for an empty gradient: a null address would mean no gradient. Never read."""


def is_dense(tensor: Tensor) -> bool:
    """Return whether kernels may read and write the memory of ``tensor`` as one range.

    It must fill a contiguous range without overlap, in any stride order, and the numbers in memory must be
    its values: those of a view with torch's negative bit have the other sign.
    """
    if tensor.is_neg():
        return False
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


def has_slices_in_order(tensor: Tensor, rows: int) -> bool:
    """Return whether ``rows`` equal ranges of a dense tensor's memory are slices of its first dimension."""
    return rows == 1 or not tensor.numel() or tensor.stride(0) * len(tensor) == tensor.numel()


class TensorTable:
    """The operands of a multi-tensor launch: one row per parameter of one dtype and device.

    Native launches read the addresses in ``cells``. PyTorch operations read the tensors.

    Args:
        weights: tensors of one device and one dtype (float32, float64, bfloat16 or float16), dense in memory
            (any order of strides).
        groups: for each weight, its row in the block of hyperparameters.
        adaptive: for each weight, whether ASAM's normalization applies.
        stochastic: for each weight, whether the ascent is rounded stochastically; only used for 16-bit
            weights. Default None: for no weight.

    Attributes:
        backend: backend of the launches over this table.
        cells: int64 ``[columns, count]``: addresses, sizes and flags.
        gradients: gradients of this pass in the layout of the weights; empty with native kernels, which use
            the addresses.
        backups: memory for each weight before the ascent.
        backed_up: for each weight, whether its backup is in ``backups``; otherwise it is its own backup.
        states: the base optimizer's state tensors by slot.
        steps: counters of updates, or None.
        scales: standard deviations of noise.

    Raises:
        ValueError: ``weights`` is empty, the weights do not share a device and a supported dtype, or one has
            gaps or no address (a DTensor).
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
            raise ValueError("a table requires at least one tensor, got none")
        self.device = weights[0].device
        self.dtype = weights[0].dtype
        if self.dtype not in extension.DTYPE_CODES:
            raise ValueError(
                f"fastsam has kernels for float32, float64, bfloat16 and float16, got {self.dtype}"
            )
        for weight in weights:
            if weight.device != self.device or weight.dtype != self.dtype:
                raise ValueError(
                    f"all weights of a table must be {self.dtype} on {self.device} like the first, got "
                    f"{weight.dtype} on {weight.device}"
                )
            if not is_dense(weight):
                raise ValueError(
                    f"a weight of shape {tuple(weight.shape)} and strides {weight.stride()} has gaps, "
                    "overlaps or a negative bit; pass a contiguous copy"
                )
            if weight.numel() and weight.data_ptr() == 0 and self.device.type != "meta":
                raise ValueError(
                    f"a {type(weight).__name__} of shape {tuple(weight.shape)} has no address, so kernels "
                    "cannot write it; pass a plain tensor, which for a DTensor is its to_local()"
                )
        self.backend: Backend = backend_of(self.device)
        self.weights = list(weights)
        self.count = len(weights)
        self.groups = list(groups)
        self.adaptive = list(adaptive)
        self.stochastic = [False] * self.count if stochastic is None else list(stochastic)
        self.gradients: list[Tensor | None] = []
        self.backups: Sequence[Tensor] = self.weights
        self.backed_up = [False] * self.count
        self.states: list[Sequence[Tensor | None]] = [[None] * self.count for _ in range(3)]
        self.steps: Sequence[Tensor] | None = None
        self.scales: list[Tensor] = []
        self.cells = array("q", bytes(8 * len(extension.TABLE_COLUMNS) * self.count))
        # Copies of gradients in the layout of the weights must stay alive until the launch is queued.
        self._gradients: list[Tensor] = []
        self._contiguous = [weight.is_contiguous() for weight in weights]
        self._shapes = [weight.shape for weight in weights]
        self._like_weights = Alike(weights)
        self._set("size", [weight.numel() for weight in weights])
        self._set("group", groups)
        self._set(
            "flags",
            [
                extension.ADAPTIVE * a + extension.STOCHASTIC * s
                for a, s in zip(self.adaptive, self.stochastic, strict=True)
            ],
        )
        self._set("weight", [weight.data_ptr() for weight in weights])
        self._backup_addresses = self.column("weight")

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of sums over the weights and of the device scalars."""
        return torch.float64 if self.backend == "native" else sum_dtype(self.device, self.dtype)

    def _set(self, column: str, values: Sequence[int]) -> None:
        start = extension.TABLE_COLUMNS.index(column) * self.count
        if len(values) != self.count:
            raise ValueError(
                f"{column} must have {self.count} entries, one per weight, got {len(values)}"
            )
        self.cells[start : start + self.count] = array("q", values)

    def column(self, name: str) -> array[int]:
        """Return a copy of one column; the names are those in ``csrc/include/fastsam/table.h``."""
        start = extension.TABLE_COLUMNS.index(name) * self.count
        return self.cells[start : start + self.count]

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the gradients of this pass; None for a weight without a gradient.

        A gradient whose strides differ from its weight's is copied into the weight's layout, and one whose
        memory does not hold its values: with torch's negative bit, or a zero tensor without memory.

        Raises:
            ValueError: a gradient is sparse, or has another device, dtype or shape than its weight. The
                gradients in the table were not changed.
        """
        if self._like_weights.fits(gradients):
            present = cast("Sequence[Tensor]", gradients)
            addresses = list(map(Tensor.data_ptr, present))
            if 0 in addresses:
                addresses = [address or _EMPTY for address in addresses]
            self._gradients = []
            self._set("gradient", addresses)
            if self.backend == "torch":
                self.gradients = list(present)
            return
        addresses = []
        kept: list[Tensor] = []
        laid_out: list[Tensor | None] = []
        append = addresses.append
        dtype, device = self.dtype, self.device
        for weight, gradient, contiguous, shape in zip(
            self.weights, gradients, self._contiguous, self._shapes, strict=True
        ):
            if gradient is None:
                append(0)
                laid_out.append(None)
                continue
            # The table's sizes are those of the constructor; a smaller gradient would be read past its end.
            if weight.shape != shape:
                raise ValueError(
                    f"the shape of a parameter changed from {tuple(shape)} to {tuple(weight.shape)} in the "
                    "same memory (p.data = p.data[...]); assign a copy, p.data = p.data[...].clone(), whose "
                    "new storage is detected"
                )
            if (
                gradient.layout is not torch.strided
                or gradient.dtype is not dtype
                or gradient.device != device
                or gradient.shape != weight.shape
            ):
                raise ValueError(describe_misfit(weight, gradient))
            if (
                not (
                    gradient.is_contiguous() if contiguous else gradient.stride() == weight.stride()
                )
                or gradient.is_neg()
                or gradient._is_zerotensor()
            ):
                gradient = torch.empty_like(
                    weight, memory_format=torch.preserve_format, requires_grad=False
                ).copy_(gradient.detach())
                kept.append(gradient)
            append(gradient.data_ptr() or _EMPTY)
            laid_out.append(gradient)
        self._gradients = kept
        self._set("gradient", addresses)
        if self.backend == "torch":
            self.gradients = laid_out

    def release_gradients(self) -> None:
        """Drop the references to the gradients, so that ``zero_grad`` frees their memory.

        Call it only after the launches that read them; the next one needs :meth:`set_gradients`.
        """
        self.gradients = []
        self._gradients = []

    def set_backups(self, backups: Sequence[Tensor], where: Sequence[bool] | None = None) -> None:
        """Set the memory for the weights before the ascent.

        Args:
            backups: a tensor in the layout of each weight. Passing the same list object again is fast.
            where: for each weight, whether its backup is in ``backups``; otherwise the weight is its own
                backup. Default None: for all weights.
        """
        if backups is not self.backups:
            self.backups = backups
            self._backup_addresses = array("q", map(Tensor.data_ptr, backups))
        self.backed_up = [True] * self.count if where is None else list(where)
        if all(self.backed_up):
            self._set("backup", self._backup_addresses)
            return
        own = self.column("weight")
        self._set(
            "backup",
            [
                backup if backed_up else weight
                for backup, weight, backed_up in zip(
                    self._backup_addresses, own, self.backed_up, strict=True
                )
            ],
        )

    def set_state(self, slot: Literal[0, 1, 2], tensors: Sequence[Tensor | None]) -> None:
        """Set one of the base optimizer's state tensors for each weight, in the weight's layout, or None.

        Raises:
            ValueError: a state tensor differs from its weight in dtype, device, shape or strides.
        """
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
        self.states[slot] = list(tensors)
        self._set(
            f"state{slot}", [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        )

    def set_steps(self, counters: Sequence[Tensor] | None) -> None:
        """Set the counters of each weight's updates: float32 scalars on the table's device, or None.

        Raises:
            ValueError: a counter has another dtype or device.
        """
        self.steps = counters
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
        """Set the standard deviation and the random stream of each weight's noise.

        Args:
            scales: ``[rows]`` per weight, on its device, contiguous; float64, or float32 with PyTorch
                operations. The weight's memory is divided into ``rows`` equal ranges: one row is one
                standard deviation for the whole weight, ``weight.shape[0]`` rows are one per filter.
            streams: index in [0, 2^32) of each weight's stream of random numbers.

        Raises:
            ValueError: a scale has another dtype, device or number of dimensions, or is not contiguous; its
                number of rows does not divide the weight; or it has several rows and the weight's first
                dimension is not the outermost in memory.
        """
        allowed = {torch.float64, self.sum_dtype}
        for weight, scale in zip(self.weights, scales, strict=True):
            if (
                scale.dtype not in allowed
                or scale.device != self.device
                or scale.dim() != 1
                or not scale.is_contiguous()
            ):
                raise ValueError(
                    f"scales must be contiguous float64 [rows] on {self.device}, got {scale.dtype} "
                    f"{tuple(scale.shape)} with strides {scale.stride()} on {scale.device}"
                )
            if scale.numel() == 0 or weight.numel() % scale.numel() != 0:
                raise ValueError(
                    f"{scale.numel()} standard deviations do not divide a weight of "
                    f"{weight.numel()} elements"
                )
            if not has_slices_in_order(weight, scale.numel()):
                raise ValueError(
                    f"{scale.numel()} standard deviations need a weight whose first dimension is outermost "
                    f"in memory, got shape {tuple(weight.shape)} with strides {weight.stride()}; pass a "
                    "contiguous copy"
                )
        rows = [max(w.numel() // s.numel(), 1) for w, s in zip(self.weights, scales, strict=True)]
        self._set("scale", [scale.data_ptr() for scale in scales])
        self._set("row_size", rows)
        self._set("stream", streams)
        self.scales = list(scales)

    def scratch(self) -> Tensor:
        """Return zero-filled scratch memory for launches over this table. Keep it and reuse it."""
        if self.backend == "torch":
            return torch.zeros(0, dtype=torch.uint8, device=self.device)
        size = extension.backend(self.device).sam_scratch_bytes(self.cells)
        return torch.zeros(max(size, 16), dtype=torch.uint8, device=self.device)


def describe_misfit(weight: Tensor, gradient: Tensor) -> str:
    """Say why the kernels cannot read ``gradient`` as that of ``weight``, and what to do."""
    if gradient.layout is not torch.strided:
        return (
            f"a gradient of shape {tuple(gradient.shape)} is sparse ({gradient.layout}); expected dense "
            "gradients: construct the embedding with sparse=False, or set p.grad = p.grad.to_dense()"
        )
    return (
        f"a gradient is {tuple(gradient.shape)} {gradient.dtype} on {gradient.device}, but its parameter "
        f"is {tuple(weight.shape)} {weight.dtype} on {weight.device}; they must match: cast or move the "
        "gradient before the step"
    )
