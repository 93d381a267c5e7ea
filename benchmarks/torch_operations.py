"""PyTorch operations, the fallback of devices without kernels, compared with native kernels on one device."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import peers
from benchmarks.machine import save
from benchmarks.sam_step import parameters_of
from benchmarks.shapes import CASES
from benchmarks.timing import Ratio, Timing, interleaved
from fastsam.kernels.backends import VARIABLE, Backend
from fastsam.kernels.lanczos import Recurrence, orthogonalize
from fastsam.optim import SAM
from fastsam.threads import cpu_threads

STEPS_TO_AGREE = 3
BACKENDS: tuple[Backend, ...] = ("native", "torch")


@dataclass(frozen=True, kw_only=True)
class TorchOperations:
    """Time SAM and Lanczos steps with PyTorch operations and native kernels, after checking that they agree.

    Ratios are medians over rounds of paired ratios, with 95 % intervals. Plain PyTorch, with one launch per
    tensor and operation as in the reference implementation, is timed too.
    """

    cases: tuple[str, ...] = ("resnet32", "resnet18")
    """Shapes to time, by name (see benchmarks/shapes.py)."""
    bases: tuple[Literal["SGD", "Adam", "AdamW"], ...] = ("SGD", "AdamW")
    """Base optimizers to time."""
    rows: tuple[int, ...] = (10, 40)
    """Numbers of basis rows in a Lanczos step."""
    columns: int = 1_000_000
    """Dimension of a Lanczos step."""
    threads: int = 2
    """Number of CPU threads; ignored on a GPU."""
    rounds: int = 21
    """Samples of each backend."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        device = torch.device(self.device)
        rows: list[dict[str, Any]] = []
        with cpu_threads(self.threads):
            for case, base in itertools.product(self.cases, self.bases):
                rows.append(self._sam(case, base, device))
            for count in self.rows:
                rows.append(self._lanczos(count, device))
            if self.save or self.out is not None:
                save("torch_operations", {"rows": rows}, device=self.device, folder=self.out)

    def _sam(self, case: str, base: str, device: torch.device) -> dict[str, Any]:
        """Time the optimizer part of a SAM step and return its row."""
        of = peers.BASES[base]
        steps: dict[str, Callable[[], object]] = {}
        weights = {}
        for name in (*BACKENDS, "plain PyTorch"):
            parameters = parameters_of(CASES[case], device)
            if name == "plain PyTorch":
                steps[name] = peers.plain(parameters, of)
            else:
                with _kernels(name):
                    optimizer = SAM(parameters, of.make, rho=peers.RHO, **of.settings)
                    optimizer.prepare()  # fixes the backend of the optimizer
                steps[name] = peers.both_halves(optimizer)
            for _ in range(STEPS_TO_AGREE):
                steps[name]()
            weights[name] = [p.detach().clone() for p in parameters]
        for found in weights.values():
            for weight, other in zip(found, weights["native"], strict=True):
                torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)
        timings = interleaved(steps, rounds=self.rounds, device=device)
        return _row(f"{case}, {base}", timings)

    def _lanczos(self, count: int, device: torch.device) -> dict[str, Any]:
        """Time a Lanczos step with ``count`` basis rows of float32 and return its row."""
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(self.columns, count, generator=generator)).Q.T
        rows = basis.contiguous()[None].to(device)
        product = torch.randn(1, rows.shape[2], generator=generator).to(device)
        successor = torch.empty_like(product)
        vector = torch.empty_like(product)
        recurrences = {
            name: Recurrence.start(1, count, device=device, dtype=dtype)
            for name, dtype in zip(BACKENDS, (torch.float64, torch.float32), strict=True)
        }

        def step(name: Backend) -> None:
            vector.copy_(product)
            recurrences[name].active.fill_(1)
            with _kernels(name):
                orthogonalize(
                    rows, vector, successor, recurrences[name], step=count - 1, eps=2.0**-23
                )

        results = []
        for name in BACKENDS:
            step(name)
            results.append(successor.clone())
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
        steps: dict[str, Callable[[], object]] = {
            name: lambda name=name: step(name)  # type: ignore[misc]
            for name in BACKENDS
        }
        timings = interleaved(steps, rounds=self.rounds, device=device)
        return _row(f"Lanczos step, {count} rows of {self.columns:,} columns", timings)


def _row(case: str, timings: dict[str, Timing]) -> dict[str, Any]:
    """Print one row and return it."""
    ratio = Ratio.of(timings["torch"].wall, timings["native"].wall)
    times = {name: f"{timing.median * 1e6:.0f} us" for name, timing in timings.items()}
    print(f"{case}: {times}, {ratio.median:.2f} times native")
    return {
        "case": case,
        "threads": torch.get_num_threads(),
        "peers": {name: timing.as_dict() for name, timing in timings.items()},
        "ratio": ratio.as_dict(),
    }


@contextmanager
def _kernels(mode: str) -> Iterator[None]:
    """Select the backend inside the context."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
