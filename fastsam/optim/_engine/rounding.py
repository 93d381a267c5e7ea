"""The share of an ascent that rounding of 16-bit weights loses."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_MUCH = 0.5
"""Share of unchanged elements above which a warning is due."""


class LostAscent:
    """Count, on one device, the elements of 16-bit weights that the last ascent could not change.

    A weight of 1 in bfloat16 has no neighbour nearer than 2^-8: a perturbation of less than half of that
    vanishes. The kernels count such elements; the warning about them never waits for a device, so devices
    other than CPU and CUDA give none.

    Args:
        device: where the weights are.

    Attributes:
        unchanged: int64 ``[1]``, what the kernels add to.
        elements: number of elements that the last ascent covered.
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
        """Warn, once, where an ascent whose count has arrived lost too much. Call it after each launch.

        Looks at ascents 1, 2, 4, 8 and so on.
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
            count = torch.empty(1, dtype=torch.int64, pin_memory=True)
            count.copy_(self.unchanged, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(self.unchanged.device))
            self._on_its_way = count, arrived

    def _judge(self, count: Tensor) -> None:
        share = int(count) / max(self.elements, 1)
        if share > _MUCH:
            self._warned = True
            warnings.warn(
                f"the ascent left {share:.0%} of the elements of the 16-bit weights as they were: rho is "
                "below their resolution. Keep the weights in float32 (autocast computes in 16 bits all "
                "the same), pass stochastic_rounding=True, or raise rho.",
                UserWarning,
                stacklevel=8,
            )
