"""Interleaved timing of things that were checked to compute the same."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, quartiles and smallest of ``samples`` samples."""

    median: float
    lower_quartile: float
    upper_quartile: float
    smallest: float
    samples: int
    calls_per_sample: int

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
    """Times callables in turn, A B C A B C, so that a noisy machine treats them alike.

    Each sample is as many back-to-back calls as fill ``seconds_per_sample``, ended by one synchronise on
    CUDA. The order rotates from round to round.

    Args:
        contestants: what to time, by name.
        rounds: samples of each.
        seconds_per_sample: how long one sample should last.
        calls: calls in every sample, instead of as many as last that long.
        device: a CUDA device to wait for at the end of a sample.
    """

    def sample(function: Callable[[], object], calls: int) -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    counts = {}
    for name, function in contestants.items():
        sample(function, 2)
        counts[name] = calls or max(1, round(seconds_per_sample / max(sample(function, 2), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
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
    return {name: _summary(values, counts[name]) for name, values in samples.items()}


def _summary(values: list[float], calls: int) -> Timing:
    lower, _, upper = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Timing(
        median=statistics.median(values),
        lower_quartile=lower,
        upper_quartile=upper,
        smallest=min(values),
        samples=len(values),
        calls_per_sample=calls,
    )
