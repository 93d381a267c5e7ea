"""Interleaved timing of things that were checked to compute the same."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per sample.

    Attributes:
        wall: wall-clock time of each sample.
        cpu: CPU time of the process in each sample, summed over its threads.
        calls_per_sample: calls that one sample averages over.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    calls_per_sample: int

    @property
    def median(self) -> float:
        """Median of the wall-clock samples."""
        return statistics.median(self.wall)

    def as_dict(self) -> dict[str, Any]:
        """Median, quartiles and smallest of the wall-clock samples, and the median of the CPU time."""
        quartiles = statistics.quantiles(self.wall, n=4) if len(self.wall) > 1 else [*self.wall] * 3
        return {
            "median": self.median,
            "lower_quartile": quartiles[0],
            "upper_quartile": quartiles[2],
            "smallest": min(self.wall),
            "cpu_median": statistics.median(self.cpu),
            "samples": len(self.wall),
            "calls_per_sample": self.calls_per_sample,
        }


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with the order-statistic interval that covers it in 95 % of repetitions.

    With fewer than six pairs no such interval exists: ``lower`` and ``upper`` are 0 and infinity.
    """

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, times: tuple[float, ...], base: tuple[float, ...]) -> Ratio:
        """Ratio of ``times`` to ``base``; sample i of both was taken in the same round."""
        ratios = sorted(time / other for time, other in zip(times, base, strict=True))
        n = len(ratios)
        # The median lies outside [k-th smallest, k-th largest] with probability 2 P(Binomial(n, 1/2) < k).
        outside, k = 0.0, 0
        while k < n // 2 and 2 * (outside + math.comb(n, k) / 2**n) <= 0.05:
            outside += math.comb(n, k) / 2**n
            k += 1
        if k == 0:
            return cls(statistics.median(ratios), 0.0, math.inf)
        return cls(statistics.median(ratios), ratios[k - 1], ratios[n - k])

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds_per_sample: float = 0.05,
    calls: int | None = None,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Time callables in turn, A B C A B C, so that a noisy machine treats them alike.

    Each sample is as many back-to-back calls as fill ``seconds_per_sample``, ended by one synchronize on
    CUDA. The order rotates from round to round.

    Args:
        contestants: what to time, by name.
        rounds: samples of each.
        seconds_per_sample: how long one sample should last.
        calls: calls in every sample, instead of as many as last that long.
        device: a CUDA device to wait for at the end of a sample.
    """

    def sample(function: Callable[[], object], calls: int) -> tuple[float, float]:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            function()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls

    counts = {}
    for name, function in contestants.items():
        sample(function, 2)
        wall, _ = sample(function, 2)
        counts[name] = calls or max(1, round(seconds_per_sample / max(wall, 1e-9)))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    names = list(contestants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                samples[name].append(sample(contestants[name], counts[name]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    timings = {}
    for name, taken in samples.items():
        timings[name] = Timing(
            wall=tuple(wall for wall, _ in taken),
            cpu=tuple(cpu for _, cpu in taken),
            calls_per_sample=counts[name],
        )
    return timings
