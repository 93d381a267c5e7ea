"""Monitoring of a run from the host: copies of T, convergence, and errors."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.curvature.lanczos.checkpoint import STATE_ARRAYS, Progress
from fastsam.curvature.lanczos.symmetry import Symmetry
from fastsam.curvature.lanczos.tridiagonal import ritz_pairs
from fastsam.curvature.operators.base import AsymmetryError
from fastsam.kernels.lanczos import Recurrence

HOST_LAG = 2
"""Number of steps that the host is behind a GPU, so that the GPU never waits for the host."""

JUDGED_EVERY = 5
"""Number of steps between two convergence checks of a run with a tolerance."""


class _Snapshot:
    """A copy of T after a step in host memory; from a GPU the copy is asynchronous."""

    def __init__(self, recurrence: Recurrence, asymmetry: Tensor | None, *, step: int) -> None:
        self.step = step
        self.recurrence = Recurrence(
            **{name: _to_host(getattr(recurrence, name)) for name in STATE_ARRAYS}
        )
        zeros = torch.zeros_like(recurrence.bound)
        self.asymmetry = _to_host(zeros if asymmetry is None else asymmetry)
        self._arrival: Any = None
        device = recurrence.alpha.device
        if device.type == "cuda":
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # The stream of the copies, which need not be on the current device.
            self._arrival.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until the copy is complete."""
        if self._arrival is not None:
            self._arrival.synchronize()


def _to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to main memory; from a GPU asynchronously."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


class Monitor:
    """Checks the recurrence step by step on the host, a fixed number of steps behind a GPU.

    A run ends at the first step that satisfies a criterion, even if later steps were computed
    meanwhile. Neither T nor the number of products therefore depends on timing, and all ranks that
    share the samples leave the loop at the same step; otherwise their all-reduces would not match.
    """

    def __init__(
        self,
        recurrence: Recurrence,
        symmetry: Symmetry | None,
        *,
        tolerance: float | None,
        start: Progress,
    ) -> None:
        self._recurrence = recurrence
        self._symmetry = symmetry
        self._tolerance = tolerance
        self._lag = HOST_LAG if recurrence.alpha.device.type == "cuda" else 0
        self._waiting: deque[_Snapshot] = deque()
        self._latest = self._snapshot(start.done - 1)
        self._latest.wait()
        self.ended = start.ended

    def note(self) -> str | None:
        """Return a line for the progress bar, at every fifth step."""
        if self._latest.step % JUDGED_EVERY:
            return None
        return f"|T| {float(self._latest.recurrence.bound.max()):.4g}"

    def record(self, step: int) -> None:
        """Start a copy of T after ``step``, and check the step that is one lag behind."""
        self._waiting.append(self._snapshot(step))
        self._judge_until(step - self._lag)

    def leaves(self, step: int) -> bool:
        """Return whether the loop ends after ``step``: one lag after the last step of the run.

        The lag applies even if the end is known earlier, because only the ranks that write
        checkpoints know it, and all ranks must leave together.
        """
        return self.ended and step >= self._latest.step + self._lag

    def settle(self) -> _Snapshot:
        """Check every recorded step; return T at the end of the run, or else after the last step."""
        if self._waiting:
            self._judge_until(self._waiting[-1].step)
        return self._latest

    def _snapshot(self, step: int) -> _Snapshot:
        asymmetry = None if self._symmetry is None else self._symmetry.asymmetry
        return _Snapshot(self._recurrence, asymmetry, step=step)

    def _judge_until(self, step: int) -> None:
        while self._waiting and self._waiting[0].step <= step and not self.ended:
            self._latest = self._waiting.popleft()
            self._latest.wait()
            self._refuse_nonfinite(self._latest)
            self._refuse_asymmetric(self._latest)
            self.ended = not bool(self._latest.recurrence.active.any()) or (
                self._tolerance is not None
                and self._latest.step % JUDGED_EVERY == 0
                and _converged(self._latest.recurrence, self._tolerance)
            )

    def _refuse_asymmetric(self, seen: _Snapshot) -> None:
        if self._symmetry is None:
            return
        worst = float(seen.asymmetry.max())
        if worst > self._symmetry.tolerated:
            raise AsymmetryError(worst)

    @staticmethod
    def _refuse_nonfinite(seen: _Snapshot) -> None:
        if not bool(torch.isfinite(seen.recurrence.bound).all()):
            broken = ~torch.isfinite(seen.recurrence.alpha[:, : seen.step + 1])
            first = int(broken.any(dim=0).nonzero()[0]) if bool(broken.any()) else seen.step
            raise FloatingPointError(
                f"the operator's product contains NaN or infinity at step {first + 1}; if the model "
                "overflows, try dtype=torch.float64"
            )


def _converged(recurrence: Recurrence, tolerance: float) -> bool:
    """Return whether the residuals of both extremes, each of the best probe, are within tolerance."""
    ends: list[tuple[float, float]] = []
    starts: list[tuple[float, float]] = []
    for probe, order in enumerate(recurrence.steps_taken.tolist()):
        alpha = recurrence.alpha[probe, :order].numpy()
        beta = recurrence.beta[probe, :order].numpy()
        nodes, vectors = ritz_pairs(alpha, beta)
        residuals = np.abs(beta[order - 1] * vectors[-1])
        starts.append((float(nodes[0]), float(residuals[0])))
        ends.append((float(nodes[-1]), float(residuals[-1])))
    norm = max(abs(min(starts)[0]), abs(max(ends)[0]))
    return max(min(starts)[1], max(ends)[1]) <= tolerance * norm
