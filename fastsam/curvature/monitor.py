"""What the host sees of a run: T step by step, and whether the run is over or has gone wrong."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.curvature.checkpoint import STATE_ARRAYS, Progress
from fastsam.curvature.operators import AsymmetryError
from fastsam.curvature.quadrature import ritz_pairs
from fastsam.kernels.backends import widened
from fastsam.kernels.lanczos import Recurrence

HOST_LAG = 2
"""Steps by which the host's look at T is behind a GPU, so that the GPU never waits for the host."""

JUDGED_EVERY = 5
"""Steps between two looks at whether a run with a tolerance may end."""


class Symmetry:
    """Whether ``q_{j-1} . A q_j`` is beta_{j-1}, as it is for a symmetric A; no synchronization.

    Attributes:
        asymmetry: the largest difference seen, a share of the operator's norm, float64 ``[probes]``.
        tolerated: what rounding explains: products are far from as exact as single operations.
    """

    def __init__(self, recurrence: Recurrence, *, eps: float) -> None:
        self._recurrence = recurrence
        self.tolerated = eps**0.4
        self.asymmetry = torch.zeros_like(recurrence.bound)

    def look(self, step: int, previous: Tensor, image: Tensor) -> None:
        """Compare at one step: q_{j-1} and A q_j, ``[probes, n]`` each."""
        overlap = widened(torch.linalg.vecdot(previous, image))
        gap = (overlap - self._recurrence.beta[:, step - 1]).abs()
        norm = widened(torch.linalg.vector_norm(image, dim=1))
        share = gap / torch.maximum(norm, self._recurrence.bound)
        share = torch.where(self._recurrence.active.bool(), share, 0)
        torch.maximum(self.asymmetry, share, out=self.asymmetry)


class _Snapshot:
    """T after a step, on the host; still on its way there where the run is on a GPU."""

    def __init__(self, recurrence: Recurrence, asymmetry: Tensor | None, *, step: int) -> None:
        self.step = step
        self.recurrence = Recurrence(
            **{name: _to_host(getattr(recurrence, name)) for name in STATE_ARRAYS}
        )
        self.asymmetry = None if asymmetry is None else _to_host(asymmetry)
        self._arrival: Any = None
        device = recurrence.alpha.device
        if device.type == "cuda":
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # The stream of the copies, not of the current device: the model may be on another.
            self._arrival.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until everything has arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory; from a GPU it is only begun."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


class Monitor:
    """The recurrence as the host sees it: judged step by step, a fixed lag behind a GPU.

    A run ends at the first step whose judgement says so, whatever was computed meanwhile: neither T
    nor the number of products depends on how fast anything is, and ranks that share out the samples
    leave the loop together.
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
        """Take T after ``step`` in, and judge what is a lag behind."""
        self._waiting.append(self._snapshot(step))
        self._judge_until(step - self._lag)

    def leaves(self, step: int) -> bool:
        """Whether the loop ends after ``step``: a lag behind the end, also if that is known already.

        Only some of the ranks may have had to settle early, to write.
        """
        return self.ended and step >= self._latest.step + self._lag

    def settle(self) -> _Snapshot:
        """Judge every step that was recorded; T where the run ends, or is."""
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
        if self._symmetry is None or seen.asymmetry is None:
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
                f"the operator's product held NaN or infinity at step {first + 1}; "
                "a larger dtype (dtype=torch.float64) may help if the model overflows"
            )


def _converged(recurrence: Recurrence, tolerance: float) -> bool:
    """Whether the best probe's residuals of both extremes are small enough."""
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
