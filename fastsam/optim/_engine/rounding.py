"""Detection of ascents that are lost to the rounding of 16-bit weights."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_MUCH = 0.5
"""Fraction of unchanged elements above which to warn."""


class LostAscent:
    """Counts, on one device, the elements of 16-bit weights that the last ascent did not change.

    The nearest neighbor of 1 in bfloat16 is 2^-8 away, so rounding to nearest removes a perturbation of less
    than half of that. The kernels count such elements. The warning about them must not make the host wait,
    so only CPU and CUDA devices, where the count can be read or polled, give one.

    Args:
        device: device of the weights.

    Attributes:
        unchanged: int64 ``[1]``, the kernels' counter.
        elements: number of elements that the last ascent perturbed.
    """

    def __init__(self, device: torch.device) -> None:
        self.unchanged = torch.zeros(1, dtype=torch.int64, device=device)
        self.elements = 0
        self._ascents = 0
        self._warned = False
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def begin(self, elements: int) -> None:
        """Begin an ascent over ``elements`` elements of 16-bit weights."""
        self.unchanged.zero_()
        self.elements = elements

    def end(self) -> None:
        """Warn once if an ascent left too many elements unchanged. Call it after each ascent.

        Ascents 1, 2, 4, 8 and so on are checked. On CUDA the count is copied asynchronously, and a later
        call checks it.
        """
        if self._warned:
            return
        self._ascents += 1
        due = self._ascents & (self._ascents - 1) == 0
        if self.unchanged.device.type == "cpu":
            if due:
                self._judge(self.unchanged)
        elif self.unchanged.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self._poll(due)

    def _poll(self, due: bool) -> None:
        if self._on_its_way is not None:
            count, arrived = self._on_its_way
            if arrived.query():  # type: ignore[no-untyped-call]
                self._on_its_way = None
                self._judge(count)
        elif due:
            count = torch.empty(1, dtype=torch.int64, device="cpu", pin_memory=True)
            count.copy_(self.unchanged, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(self.unchanged.device))
            self._on_its_way = count, arrived

    def _judge(self, count: Tensor) -> None:
        share = int(count) / max(self.elements, 1)
        if share > _MUCH:
            self._warned = True
            warnings.warn(
                f"the ascent left {share:.0%} of the elements of the 16-bit weights unchanged: rho is below "
                "their resolution. Keep the weights in float32 (autocast still computes in 16 bits), pass "
                "stochastic_rounding=True, or raise rho.",
                UserWarning,
                stacklevel=8,
            )
