"""Interleaved timing of several callables."""

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
        cpu: CPU time of the process in each sample, summed over threads.
        calls_per_sample: number of calls averaged in one sample.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    calls_per_sample: int

    @property
    def median(self) -> float:
        """Median of the wall-clock samples."""
        return statistics.median(self.wall)

    def as_dict(self) -> dict[str, Any]:
        """Return median, quartiles and smallest wall-clock sample, and the median CPU time."""
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
    """Median of paired ratios, with a 95 % confidence interval from order statistics.

    With fewer than six pairs there is no such interval, and ``lower`` and ``upper`` are 0 and infinity.
    """

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, times: tuple[float, ...], base: tuple[float, ...]) -> Ratio:
        """Compute the ratio of ``times`` to ``base``, whose samples i were taken in the same round."""
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
    """Time callables alternately (A B C A B C), so that noise of the machine affects all of them.

    A sample consists of back-to-back calls that take about ``seconds_per_sample``, followed by one
    synchronization on CUDA. The order rotates from round to round.

    Args:
        contestants: callables by name.
        rounds: number of samples of each.
        seconds_per_sample: approximate duration of one sample.
        calls: number of calls per sample; None to derive it from ``seconds_per_sample``.
        device: CUDA device to synchronize with at the end of a sample.
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
